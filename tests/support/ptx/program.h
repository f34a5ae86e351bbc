// A decoded kernel and its launch, as parse.py and executor.py write them. The lists of names have the same order
// there.
#pragma once

#include <cstdint>
#include <stdexcept>

// clang-format off
#define PTX_TYPES(X) \
  X(u8) X(s8) X(u16) X(s16) X(u32) X(s32) X(u64) X(s64) X(f16) X(bf16) X(f32) X(f64) X(pred) X(f16x2) X(bf16x2)
#define PTX_OPERATIONS(X) \
  X(add) X(sub) X(mul) X(mad) X(fma) X(div) X(rem) X(neg) X(abs) X(min) X(max) X(and) X(or) X(xor) X(not) X(shl) \
  X(shr) X(bfe) X(bfi) X(prmt) X(lop3) X(shf) X(clz) X(popc) X(copysign) X(selp) X(setp) X(ex2) X(rcp) X(rsqrt) \
  X(sqrt) X(mov) X(pack) X(unpack) X(cvt) X(cvt_pack) X(cvta) X(cvta_to) X(ld) X(st) X(ldmatrix) X(stmatrix) \
  X(shfl) X(bar) X(bar_warp) X(bra) X(ret) X(trap) X(fence)
#define PTX_FLAGS(X) \
  X(ftz) X(sat) X(nan) X(wide) X(hi) X(rz) X(rm) X(rp) X(rni) X(rzi) X(rmi) X(rpi) X(relu) X(trans) X(negated) \
  X(left) X(clamp)
#define PTX_SPACES(X) X(global) X(shared) X(local) X(param) X(generic)
#define PTX_COMPARISONS(X) \
  X(eq) X(ne) X(lt) X(le) X(gt) X(ge) X(equ) X(neu) X(ltu) X(leu) X(gtu) X(geu) X(num) X(nan)
#define PTX_SHUFFLES(X) X(idx) X(up) X(down) X(bfly)
#define PTX_COMBINATIONS(X) X(none) X(and) X(or) X(xor)
#define PTX_SPECIALS(X) \
  X(tid_x) X(tid_y) X(tid_z) X(ctaid_x) X(ctaid_y) X(ctaid_z) X(ntid_x) X(ntid_y) X(ntid_z) X(nctaid_x) X(nctaid_y) \
  X(nctaid_z) X(laneid) X(dynamic_smem_size)
#define PTX_COUNTS(X) \
  X(instructions) X(barriers) X(rounds) X(races) X(unwritten) X(conflicts) X(unordered) X(divisions_by_zero)
// clang-format on

namespace ptx {

#define PTX_ENTRY(name) kType_##name,
enum Type : int32_t { PTX_TYPES(PTX_ENTRY) };
#undef PTX_ENTRY
#define PTX_ENTRY(name) kOp_##name,
enum Operation : int32_t { PTX_OPERATIONS(PTX_ENTRY) };
#undef PTX_ENTRY
#define PTX_ENTRY(name) kFlagBit_##name,
enum FlagBit : int32_t { PTX_FLAGS(PTX_ENTRY) };
#undef PTX_ENTRY
#define PTX_ENTRY(name) kFlag_##name = 1 << kFlagBit_##name,
enum Flag : int32_t { PTX_FLAGS(PTX_ENTRY) };
#undef PTX_ENTRY
#define PTX_ENTRY(name) kSpace_##name,
enum Space : int32_t { PTX_SPACES(PTX_ENTRY) };
#undef PTX_ENTRY
#define PTX_ENTRY(name) kIs_##name,
enum Comparison : int32_t { PTX_COMPARISONS(PTX_ENTRY) };
#undef PTX_ENTRY
#define PTX_ENTRY(name) kShuffle_##name,
enum Shuffle : int32_t { PTX_SHUFFLES(PTX_ENTRY) };
#undef PTX_ENTRY
#define PTX_ENTRY(name) kCombine_##name,
enum Combination : int32_t { PTX_COMBINATIONS(PTX_ENTRY) };
#undef PTX_ENTRY
#define PTX_ENTRY(name) kSpecial_##name,
enum Special : int32_t { PTX_SPECIALS(PTX_ENTRY) };
#undef PTX_ENTRY

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
#define PTX_ENTRY(name) int64_t name;
  PTX_COUNTS(PTX_ENTRY)
#undef PTX_ENTRY
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
