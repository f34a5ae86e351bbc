// Numbers in registers of 64 bits, and their conversions with one rounding.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>

#include "program.h"

namespace ptx {

constexpr uint32_t kNaN32 = 0x7FFFFFFF;
constexpr uint16_t kNaN16 = 0x7FFF;

inline uint64_t low(uint64_t v, int bits) { return bits >= 64 ? v : v & ((1ull << bits) - 1); }
inline int64_t extended(uint64_t v, int bits) {
  return bits >= 64 ? static_cast<int64_t>(v) : static_cast<int64_t>(v << (64 - bits)) >> (64 - bits);
}

inline float as_float(uint64_t v) { return std::bit_cast<float>(static_cast<uint32_t>(v)); }
inline double as_double(uint64_t v) { return std::bit_cast<double>(v); }
inline uint64_t bits_of(float v) { return std::bit_cast<uint32_t>(v); }
inline uint64_t bits_of(double v) { return std::bit_cast<uint64_t>(v); }

inline float from_half(uint64_t v) { return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(v))); }
inline float from_bfloat(uint64_t v) { return as_float((v & 0xFFFF) << 16); }
inline float from_16_bits(uint64_t v, bool half) { return half ? from_half(v) : from_bfloat(v); }

inline uint16_t to_half(double v) { return std::isnan(v) ? kNaN16 : std::bit_cast<uint16_t>(static_cast<_Float16>(v)); }
inline uint16_t to_bfloat(double v) {
  if (std::isnan(v)) return kNaN16;
  const float near = static_cast<float>(v);
  uint32_t u = std::bit_cast<uint32_t>(near);
  // An inexact float is made odd, so that the second rounding sees on which side of a tie the number is.
  if (static_cast<double>(near) != v && std::isfinite(near)) u = (u - (std::fabs(near) > std::fabs(v))) | 1;
  return static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
inline uint16_t to_16_bits(double v, bool half) { return half ? to_half(v) : to_bfloat(v); }

inline float flushed(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.f, v) : v; }

// A register's number of a float type of one number.
inline double number(uint64_t v, int type) {
  switch (type) {
    case kType_f64: return as_double(v);
    case kType_f32: return as_float(v);
    default: return from_16_bits(v, type == kType_f16);
  }
}

// The rounding of an instruction, while this lives.
class Rounding {
 public:
  explicit Rounding(int flags) : other_((flags & (kFlag_rz | kFlag_rm | kFlag_rp)) != 0) {
    if (!other_) return;
    before_ = std::fegetround();
    std::fesetround(flags & kFlag_rz ? FE_TOWARDZERO : flags & kFlag_rm ? FE_DOWNWARD : FE_UPWARD);
  }
  ~Rounding() {
    if (other_) std::fesetround(before_);
  }
  Rounding(const Rounding&) = delete;
  Rounding& operator=(const Rounding&) = delete;

 private:
  bool other_;
  int before_ = 0;
};

}  // namespace ptx
