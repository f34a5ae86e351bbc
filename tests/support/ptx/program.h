// A decoded kernel and its launch, as parse.py and executor.py write them. The lists of names have the same order
// there.
#pragma once

#include <cstdint>
#include <stdexcept>

// clang-format off
#define PTX_TYPES(X, P) \
  X(P, u8) X(P, s8) X(P, u16) X(P, s16) X(P, u32) X(P, s32) X(P, u64) X(P, s64) X(P, f16) X(P, bf16) X(P, f32) \
  X(P, f64) X(P, pred) X(P, f16x2) X(P, bf16x2)
#define PTX_OPERATIONS(X, P) \
  X(P, add) X(P, sub) X(P, mul) X(P, mad) X(P, fma) X(P, div) X(P, rem) X(P, neg) X(P, abs) X(P, min) X(P, max) \
  X(P, and) X(P, or) X(P, xor) X(P, not) X(P, shl) X(P, shr) X(P, bfe) X(P, bfi) X(P, prmt) X(P, lop3) X(P, shf) \
  X(P, clz) X(P, popc) X(P, copysign) X(P, selp) X(P, setp) X(P, ex2) X(P, rcp) X(P, rsqrt) X(P, sqrt) X(P, mov) \
  X(P, pack) X(P, unpack) X(P, cvt) X(P, cvt_pack) X(P, cvta) X(P, cvta_to) X(P, ld) X(P, st) X(P, ldmatrix) \
  X(P, stmatrix) X(P, shfl) X(P, bar) X(P, bar_warp) X(P, bra) X(P, ret) X(P, trap) X(P, fence)
#define PTX_FLAGS(X, P) \
  X(P, ftz) X(P, sat) X(P, nan) X(P, wide) X(P, hi) X(P, rz) X(P, rm) X(P, rp) X(P, rni) X(P, rzi) X(P, rmi) X(P, rpi) \
  X(P, relu) X(P, trans) X(P, negated) X(P, left) X(P, clamp)
#define PTX_SPACES(X, P) X(P, global) X(P, shared) X(P, local) X(P, param) X(P, generic)
#define PTX_COMPARISONS(X, P) \
  X(P, eq) X(P, ne) X(P, lt) X(P, le) X(P, gt) X(P, ge) X(P, equ) X(P, neu) X(P, ltu) X(P, leu) X(P, gtu) X(P, geu) \
  X(P, num) X(P, nan)
#define PTX_SHUFFLES(X, P) X(P, idx) X(P, up) X(P, down) X(P, bfly)
#define PTX_COMBINATIONS(X, P) X(P, none) X(P, and) X(P, or) X(P, xor)
#define PTX_SPECIALS(X, P) \
  X(P, tid_x) X(P, tid_y) X(P, tid_z) X(P, ctaid_x) X(P, ctaid_y) X(P, ctaid_z) X(P, ntid_x) X(P, ntid_y) X(P, ntid_z) \
  X(P, nctaid_x) X(P, nctaid_y) X(P, nctaid_z) X(P, laneid) X(P, dynamic_smem_size)
#define PTX_COUNTS(X, P) \
  X(P, instructions) X(P, barriers) X(P, rounds) X(P, races) X(P, unwritten) X(P, conflicts) X(P, unordered) \
  X(P, divisions_by_zero)
// clang-format on

namespace ptx {

// X of the lists for an entry of an enumeration, and for a bit of Flag. P is the prefix of its name.
#define PTX_ENTRY(prefix, name) prefix##name,
#define PTX_BIT(prefix, name) prefix##name = 1 << kFlagBit_##name,

enum Type : int32_t { PTX_TYPES(PTX_ENTRY, kType_) };
enum Operation : int32_t { PTX_OPERATIONS(PTX_ENTRY, kOp_) };
enum FlagBit : int32_t { PTX_FLAGS(PTX_ENTRY, kFlagBit_) };
enum Flag : int32_t { PTX_FLAGS(PTX_BIT, kFlag_) };
enum Space : int32_t { PTX_SPACES(PTX_ENTRY, kSpace_) };
enum Comparison : int32_t { PTX_COMPARISONS(PTX_ENTRY, kIs_) };
enum Shuffle : int32_t { PTX_SHUFFLES(PTX_ENTRY, kShuffle_) };
enum Combination : int32_t { PTX_COMBINATIONS(PTX_ENTRY, kCombine_) };
enum Special : int32_t { PTX_SPECIALS(PTX_ENTRY, kSpecial_) };

constexpr int kBits[] = {8, 8, 16, 16, 32, 32, 64, 64, 16, 16, 32, 64, 1, 32, 32};
constexpr bool is_signed(int type) {
  return type == kType_s8 || type == kType_s16 || type == kType_s32 || type == kType_s64;
}
constexpr bool is_float(int type) { return type >= kType_f16 && type != kType_pred; }

struct Instruction {
  int32_t op, type;
  int32_t other;  // the second type, the comparison, or the kind of a shuffle
  int32_t flags;
  int32_t predicate, negated;  // a register or -1
  int32_t results, sources;
  int32_t d[8], s[8];  // registers; -1 for a result that is thrown away
  int32_t target;      // of a branch
  int32_t space, width, count;
  int32_t combine, line;
  int64_t immediate;  // the offset of an address, the table of lop3, the number of a barrier
};
static_assert(sizeof(Instruction) == 128);

// A piece of global memory. Pieces lie kPiece apart, so that no offset leads from one into another.
struct Allocation {
  uint64_t address;
  uint8_t* host;
  uint64_t bytes;
  uint8_t* written;        // a byte for each byte, or null: all are
  int64_t shift;           // log2 of the bytes whose accesses are ordered as one
  int64_t loaded, stored;  // sectors, each counted once for each block
};
constexpr int kPiece = 40;
constexpr uint64_t kShared = 0xF00000ull << kPiece, kLocal = 0xF10000ull << kPiece;

struct Counts {
#define PTX_FIELD(prefix, name) prefix name;
  PTX_COUNTS(PTX_FIELD, int64_t)
#undef PTX_FIELD
};

struct Launch {
  const Instruction* code;
  int32_t code_length, registers;
  const uint8_t* register_bits;
  const int32_t* constant_slots;
  const uint64_t* constant_values;
  const int32_t* special_slots;
  const int32_t* special_names;
  const uint8_t* parameters;
  Allocation* allocations;
  const int32_t* blocks;
  int64_t* executed;  // of each instruction: how often a lane has executed it
  int32_t constants, specials, parameter_bytes, allocation_count, block_count;
  int32_t grid[3], block[3];
  int32_t static_shared, dynamic_shared, local;
  int32_t first_wins;  // of lanes that store to one address in one instruction the first one's number stays, else the
                       // last's
  uint64_t seed;
};

// A kernel that cannot go on.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace ptx
