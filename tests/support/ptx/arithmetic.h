// Instructions whose results depend on a lane's own registers alone.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "numbers.h"
#include "report.h"

namespace ptx {

// Of one warp: 32 numbers for each register.
struct Registers {
  std::vector<uint64_t> values;
  uint64_t* operator[](int i) { return values.data() + static_cast<size_t>(i) * 32; }
};

template <class F>
void each(uint32_t lanes, const F& f) {
  if (lanes == 0xFFFFFFFFu) {
    for (int lane = 0; lane < 32; ++lane) f(lane);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) f(std::countr_zero(lanes));
  }
}

class Arithmetic {
 public:
  Arithmetic(const uint8_t* register_bits, Report& report) : register_bits_(register_bits), report_(report) {}

  void run(const Instruction& i, Registers& r, uint32_t lanes) {
    if (is_float(i.type) && floats(i, r, lanes)) return;
    switch (i.op) {
      case kOp_setp: compare(i, r, lanes); return;
      case kOp_cvt: convert(i, r, lanes); return;
      case kOp_cvt_pack: convert_pair(i, r, lanes); return;
      case kOp_pack: pack(i, r, lanes); return;
      case kOp_unpack: unpack(i, r, lanes); return;
      default: bits(i, r, lanes);
    }
  }

  // Writes a number of a type into a register that may be wider.
  void put(const Instruction& i, Registers& r, int result, int lane, uint64_t v, int type) const {
    const int slot = i.d[result];
    if (slot < 0) return;
    v = low(v, kBits[type]);
    if (is_signed(type)) v = low(static_cast<uint64_t>(extended(v, kBits[type])), register_bits_[slot]);
    r[slot][lane] = v;
  }

 private:
  // ---- floats

  static double minimum(double x, double y, bool most, bool nan) {
    if (std::isnan(x) || std::isnan(y)) return nan ? x + y : std::isnan(x) ? y : x;
    if (x == y) return std::signbit(x) == most ? y : x;
    return (x < y) == most ? y : x;
  }

  // False where the instruction treats its numbers as bits.
  bool floats(const Instruction& i, Registers& r, uint32_t lanes) {
    switch (i.op) {
      case kOp_add: map(i, r, lanes, [](auto x, auto y, auto) { return x + y; }); return true;
      case kOp_sub: map(i, r, lanes, [](auto x, auto y, auto) { return x - y; }); return true;
      case kOp_mul: map(i, r, lanes, [](auto x, auto y, auto) { return x * y; }); return true;
      case kOp_mad:
      case kOp_fma: map(i, r, lanes, [](auto x, auto y, auto z) { return std::fma(x, y, z); }); return true;
      case kOp_div: map(i, r, lanes, [](auto x, auto y, auto) { return x / y; }); return true;
      case kOp_ex2: map(i, r, lanes, [](auto x, auto, auto) { return std::exp2(x); }); return true;
      case kOp_rcp: map(i, r, lanes, [](auto x, auto, auto) { return 1 / x; }); return true;
      case kOp_rsqrt:
        map(i, r, lanes, [](auto x, auto, auto) { return static_cast<decltype(x)>(1 / std::sqrt(double(x))); });
        return true;
      case kOp_sqrt: map(i, r, lanes, [](auto x, auto, auto) { return std::sqrt(x); }); return true;
      case kOp_min:
      case kOp_max: {
        const bool most = i.op == kOp_max, nan = (i.flags & kFlag_nan) != 0;
        map(i, r, lanes, [=](auto x, auto y, auto) { return static_cast<decltype(x)>(minimum(x, y, most, nan)); });
        return true;
      }
      case kOp_neg:
      case kOp_abs: sign(i, r, lanes); return true;
      default: return false;
    }
  }

  template <class F>
  void map(const Instruction& i, Registers& r, uint32_t lanes, const F& f) {
    const Rounding rounding(i.flags);
    uint64_t* d = r[i.d[0]];
    const uint64_t *a = r[i.s[0]], *b = i.sources > 1 ? r[i.s[1]] : a, *c = i.sources > 2 ? r[i.s[2]] : a;
    if (i.type == kType_f64) {
      each(lanes, [&](int l) { d[l] = bits_of(f(as_double(a[l]), as_double(b[l]), as_double(c[l]))); });
    } else if (i.type == kType_f32) {
      const bool flush = (i.flags & kFlag_ftz) != 0, clip = (i.flags & kFlag_sat) != 0;
      const auto in = [&](uint64_t v) { return flush ? flushed(as_float(v)) : as_float(v); };
      each(lanes, [&](int l) {
        float v = f(in(a[l]), in(b[l]), in(c[l]));
        if (flush) v = flushed(v);
        if (clip) v = std::isnan(v) ? 0.f : std::min(1.f, std::max(0.f, v));
        d[l] = std::isnan(v) ? kNaN32 : bits_of(v);
      });
    } else {
      const bool half = i.type == kType_f16 || i.type == kType_f16x2;
      const int numbers = kBits[i.type] / 16;
      each(lanes, [&](int l) {
        uint64_t out = 0;
        for (int k = 0; k < numbers; ++k) {
          const auto in = [&](uint64_t v) { return static_cast<double>(from_16_bits(v >> (16 * k), half)); };
          out |= static_cast<uint64_t>(to_16_bits(f(in(a[l]), in(b[l]), in(c[l])), half)) << (16 * k);
        }
        d[l] = out;
      });
    }
  }

  static void sign(const Instruction& i, Registers& r, uint32_t lanes) {
    uint64_t *d = r[i.d[0]], *a = r[i.s[0]];
    uint64_t mask = 1ull << (kBits[i.type] - 1);
    if (i.type == kType_f16x2 || i.type == kType_bf16x2) mask = 0x80008000;
    const bool flush = i.type == kType_f32 && (i.flags & kFlag_ftz) != 0;
    each(lanes, [&](int l) {
      const uint64_t v = flush ? bits_of(flushed(as_float(a[l]))) : a[l];
      d[l] = i.op == kOp_neg ? v ^ mask : v & ~mask;
    });
  }

  // ---- comparisons and conversions

  template <class T>
  static bool holds(int comparison, T x, T y) {
    switch (comparison) {
      case kIs_eq: return x == y;
      case kIs_ne: return x != y;
      case kIs_lt: return x < y;
      case kIs_le: return x <= y;
      case kIs_gt: return x > y;
      default: return x >= y;
    }
  }
  static bool float_holds(int comparison, double x, double y) {
    const bool unordered = std::isnan(x) || std::isnan(y);
    if (comparison == kIs_num) return !unordered;
    if (comparison == kIs_nan) return unordered;
    if (comparison >= kIs_equ) return unordered || holds(comparison - kIs_equ, x, y);
    return !unordered && holds(comparison, x, y);
  }

  void compare(const Instruction& i, Registers& r, uint32_t lanes) {
    const uint64_t *a = r[i.s[0]], *b = r[i.s[1]], *c = i.sources > 2 ? r[i.s[2]] : nullptr;
    const auto combined = [&](bool v, int l) {
      if (c == nullptr) return v;
      const bool other = ((c[l] & 1) != 0) != ((i.flags & kFlag_negated) != 0);
      return i.combine == kCombine_and ? v && other : i.combine == kCombine_or ? v || other : v != other;
    };
    const auto put_predicate = [&](int result, int l, bool v) {
      if (result < i.results && i.d[result] >= 0) r[i.d[result]][l] = combined(v, l);
    };
    if (i.type == kType_f16x2 || i.type == kType_bf16x2) {  // the second predicate is of the upper halves
      each(lanes, [&](int l) {
        bool held[2];
        for (int k = 0; k < 2; ++k) {
          const auto in = [&](uint64_t v) { return from_16_bits(v >> (16 * k), i.type == kType_f16x2); };
          held[k] = float_holds(i.other, in(a[l]), in(b[l]));
        }
        put_predicate(0, l, held[0]);
        put_predicate(1, l, held[1]);
      });
      return;
    }
    const int width = kBits[i.type];
    const bool flush = i.type == kType_f32 && (i.flags & kFlag_ftz) != 0;
    each(lanes, [&](int l) {
      bool held;
      if (is_float(i.type)) {
        const auto in = [&](uint64_t v) { return flush ? flushed(as_float(v)) : number(v, i.type); };
        held = float_holds(i.other, in(a[l]), in(b[l]));
      } else if (is_signed(i.type)) {
        held = holds(i.other, extended(a[l], width), extended(b[l], width));
      } else {
        held = holds(i.other, low(a[l], width), low(b[l], width));
      }
      put_predicate(0, l, held);
      put_predicate(1, l, !held);
    });
  }

  void convert(const Instruction& i, Registers& r, uint32_t lanes) {
    const uint64_t* a = r[i.s[0]];
    const int from = i.other, to = i.type;
    const bool from_float = is_float(from), to_float = is_float(to);
    const Rounding rounding(i.flags);
    each(lanes, [&](int l) {
      if (from_float) {
        const double v = rounded(i, from, number(a[l], from));
        put(i, r, 0, l, to_float ? float_bits(i, v) : integer_bits(v, to), to);
      } else if (to_float) {
        put(i, r, 0, l, float_of_integer(a[l], from, to), to);
      } else {
        put(i, r, 0, l, integer_of_integer(i, a[l], from, to), to);
      }
    });
  }
  static double rounded(const Instruction& i, int from, double v) {
    if ((i.flags & kFlag_ftz) != 0 && from == kType_f32) v = flushed(static_cast<float>(v));
    if (i.flags & kFlag_rni) return std::nearbyint(v);
    if (i.flags & kFlag_rzi) return std::trunc(v);
    if (i.flags & kFlag_rmi) return std::floor(v);
    if (i.flags & kFlag_rpi) return std::ceil(v);
    return v;
  }
  static uint64_t float_bits(const Instruction& i, double v) {
    if (i.flags & kFlag_sat) v = std::isnan(v) ? 0 : std::min(1.0, std::max(0.0, v));
    if (i.flags & kFlag_relu) v = v < 0 ? 0 : v;
    if (i.type == kType_f64) return bits_of(v);
    if (i.type != kType_f32) return to_16_bits(v, i.type == kType_f16);
    float f = static_cast<float>(v);
    if (i.flags & kFlag_ftz) f = flushed(f);
    return std::isnan(f) ? kNaN32 : bits_of(f);
  }
  static uint64_t integer_bits(double v, int to) {
    const int width = kBits[to];
    if (std::isnan(v)) return width == 64 ? 1ull << 63 : 0;
    if (!is_signed(to)) {
      if (v >= std::ldexp(1.0, width)) return ~0ull;
      return v <= 0 ? 0 : static_cast<uint64_t>(v);
    }
    const double end = std::ldexp(1.0, width - 1);
    if (v >= end) return (1ull << (width - 1)) - 1;
    return v < -end ? 1ull << (width - 1) : static_cast<uint64_t>(static_cast<int64_t>(v));
  }
  static uint64_t float_of_integer(uint64_t v, int from, int to) {
    const bool has_sign = is_signed(from);
    const int64_t with = extended(v, kBits[from]);
    const uint64_t without = low(v, kBits[from]);
    const double wide = has_sign ? static_cast<double>(with) : static_cast<double>(without);
    if (to == kType_f64) return bits_of(wide);
    if (to == kType_f32) return bits_of(has_sign ? static_cast<float>(with) : static_cast<float>(without));
    return to_16_bits(wide, to == kType_f16);
  }
  static uint64_t integer_of_integer(const Instruction& i, uint64_t v, int from, int to) {
    const __int128 one = 1, exact = is_signed(from) ? static_cast<__int128>(extended(v, kBits[from]))
                                                    : static_cast<__int128>(low(v, kBits[from]));
    if ((i.flags & kFlag_sat) == 0) return static_cast<uint64_t>(exact);
    const int width = kBits[to];
    const __int128 least = is_signed(to) ? -(one << (width - 1)) : 0;
    const __int128 most = (is_signed(to) ? one << (width - 1) : one << width) - 1;
    return static_cast<uint64_t>(std::min(most, std::max(least, exact)));
  }

  // Two floats to two numbers of 16 bits; the first one becomes the upper half.
  static void convert_pair(const Instruction& i, Registers& r, uint32_t lanes) {
    uint64_t *d = r[i.d[0]], *a = r[i.s[0]], *b = r[i.s[1]];
    const auto in = [&](uint64_t v) -> uint64_t {
      const float f = as_float(v);
      return to_16_bits((i.flags & kFlag_relu) != 0 && f < 0 ? 0.f : f, i.type == kType_f16x2);
    };
    each(lanes, [&](int l) { d[l] = in(a[l]) << 16 | in(b[l]); });
  }

  static void pack(const Instruction& i, Registers& r, uint32_t lanes) {
    each(lanes, [&](int l) {
      uint64_t v = 0;
      for (int k = 0; k < i.sources; ++k) v |= low(r[i.s[k]][l], i.width) << (k * i.width);
      r[i.d[0]][l] = v;
    });
  }
  static void unpack(const Instruction& i, Registers& r, uint32_t lanes) {
    each(lanes, [&](int l) {
      const uint64_t v = r[i.s[0]][l];
      for (int k = 0; k < i.results; ++k) {
        if (i.d[k] >= 0) r[i.d[k]][l] = low(v >> (k * i.width), i.width);
      }
    });
  }

  // ---- integers and bits

  void bits(const Instruction& i, Registers& r, uint32_t lanes) {
    uint64_t* d = i.results > 0 && i.d[0] >= 0 ? r[i.d[0]] : nullptr;
    if (d == nullptr) report_.fail("an instruction without a result", -1);
    const uint64_t* s[4];
    for (int k = 0; k < 4; ++k) s[k] = r[i.s[k < i.sources ? k : 0]];
    each(lanes, [&](int l) {
      const uint64_t v[4] = {s[0][l], s[1][l], s[2][l], s[3][l]};
      d[l] = one(i, v, l);
    });
  }

  uint64_t one(const Instruction& i, const uint64_t* v, int lane) {
    const int width = kBits[i.type];
    const bool has_sign = is_signed(i.type);
    const uint64_t a = low(v[0], width), b = low(v[1], width), c = v[2];
    const int64_t x = extended(a, width), y = extended(b, width);
    const uint32_t count = static_cast<uint32_t>(v[1]);  // of a shift, of 32 bits for any type
    switch (i.op) {
      case kOp_add: return low(a + b, width);
      case kOp_sub: return low(a - b, width);
      case kOp_mul:
      case kOp_mad: return product(i, a, b, c);
      case kOp_div:
      case kOp_rem:
        if (b == 0) {
          report_.found(report_.counts.divisions_by_zero, "a division by zero", 0, lane);
          return low(~0ull, width);
        }
        if (!has_sign) return i.op == kOp_div ? a / b : a % b;
        if (y == -1) return i.op == kOp_div ? low(-a, width) : 0;
        return low(static_cast<uint64_t>(i.op == kOp_div ? x / y : x % y), width);
      case kOp_neg: return low(-a, width);
      case kOp_abs: return low(x < 0 ? -a : a, width);
      case kOp_min: return has_sign ? (x < y ? a : b) : std::min(a, b);
      case kOp_max: return has_sign ? (x < y ? b : a) : std::max(a, b);
      case kOp_and: return a & b;
      case kOp_or: return a | b;
      case kOp_xor: return a ^ b;
      case kOp_not: return low(~a, width);
      case kOp_shl: return count >= static_cast<uint32_t>(width) ? 0 : low(a << count, width);
      case kOp_shr:
        if (has_sign) return low(static_cast<uint64_t>(x >> std::min<uint32_t>(count, width - 1)), width);
        return count >= static_cast<uint32_t>(width) ? 0 : a >> count;
      case kOp_bfe: return extract(i, a, v[1] & 255, c & 255);
      case kOp_bfi: return insert(a, b, c & 255, v[3] & 255, width);
      case kOp_prmt: return permute(v[0], v[1], c);
      case kOp_lop3: return logic(i.immediate, v[0], v[1], c);
      case kOp_shf: return funnel(i, v[0], v[1], static_cast<uint32_t>(c));
      case kOp_clz: return a == 0 ? width : std::countl_zero(a) - (64 - width);
      case kOp_popc: return std::popcount(a);
      case kOp_copysign: {
        const uint64_t sign = 1ull << (width - 1);
        return (b & ~sign) | (a & sign);
      }
      case kOp_selp: return ((c & 1) != 0) != ((i.flags & kFlag_negated) != 0) ? a : b;
      case kOp_mov: return a;
      case kOp_cvta: return v[0] + (i.space == kSpace_shared ? kShared : i.space == kSpace_local ? kLocal : 0);
      case kOp_cvta_to: return v[0] - (i.space == kSpace_shared ? kShared : i.space == kSpace_local ? kLocal : 0);
      default: report_.fail("an instruction that the executor lacks", lane);
    }
  }

  static uint64_t product(const Instruction& i, uint64_t a, uint64_t b, uint64_t c) {
    const int width = kBits[i.type];
    unsigned __int128 p;
    if (is_signed(i.type)) {
      p = static_cast<unsigned __int128>(static_cast<__int128>(extended(a, width)) * extended(b, width));
    } else {
      p = static_cast<unsigned __int128>(a) * b;
    }
    uint64_t v = static_cast<uint64_t>(i.flags & kFlag_hi ? p >> width : p);
    if (i.op == kOp_mad) v += c;
    return low(v, i.flags & kFlag_wide ? 2 * width : width);
  }
  static uint64_t extract(const Instruction& i, uint64_t a, uint32_t begin, uint32_t length) {
    const int width = kBits[i.type];
    const uint32_t end = begin + length, last = width - 1;
    const bool fill = is_signed(i.type) && length > 0 && (a >> std::min(end - 1, last) & 1) != 0;
    uint64_t out = 0;
    for (uint32_t k = 0; k <= last; ++k) {
      const bool bit = k < length && begin + k <= last ? (a >> (begin + k) & 1) != 0 : fill;
      out |= static_cast<uint64_t>(bit) << k;
    }
    return out;
  }
  static uint64_t insert(uint64_t from, uint64_t into, uint32_t begin, uint32_t length, int width) {
    for (uint32_t k = 0; k < length && begin + k < static_cast<uint32_t>(width); ++k) {
      into = (into & ~(1ull << (begin + k))) | (from >> k & 1) << (begin + k);
    }
    return into;
  }
  static uint64_t permute(uint64_t a, uint64_t b, uint64_t selectors) {
    const uint64_t both = low(a, 32) | b << 32;
    uint64_t out = 0;
    for (int k = 0; k < 4; ++k) {
      const uint64_t selector = selectors >> (4 * k) & 15;
      uint64_t byte = both >> ((selector & 7) * 8) & 255;
      if (selector & 8) byte = byte & 128 ? 255 : 0;
      out |= byte << (8 * k);
    }
    return out;
  }
  static uint64_t logic(int64_t table, uint64_t a, uint64_t b, uint64_t c) {
    uint64_t out = 0;
    for (int k = 0; k < 8; ++k) {
      if (table >> k & 1) out |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    }
    return low(out, 32);
  }
  static uint64_t funnel(const Instruction& i, uint64_t lower, uint64_t upper, uint32_t count) {
    count = i.flags & kFlag_clamp ? std::min<uint32_t>(count, 32) : count & 31;
    const uint64_t both = upper << 32 | low(lower, 32);
    if ((i.flags & kFlag_left) == 0) return low(both >> count, 32);
    return count == 32 ? low(both, 32) : both << count >> 32;
  }

  const uint8_t* register_bits_;
  Report& report_;
};

}  // namespace ptx
