// A branch in memory: the arrays of its nodes, and the neighbours of each node.
#pragma once

#include "../common/graph.h"
#include "../common/problem.h"
#include "scratch.h"
#include "vec.h"

namespace steam {
namespace {

// The places of a branch's nodes in an array of `size` numbers: the node of row i and column j is at position
// first + i * pitch + j. The array also has places around the nodes, for the neighbours of the outermost nodes. A ring
// is one row, and the places around it repeat its other end.
template <class L>
struct Branch {
  using A = typename L::A;
  int64_t rows, cols;
  bool wraps;
  int64_t first, pitch, size;
  int64_t span;            // positions from the first to the last node
  int64_t margin;          // ring: repeated nodes at each end
  int64_t count;           // neighbours of a node
  int64_t* offsets;        // from the position of a node to the position of neighbour k
  typename L::I* present;  // lattice: bit k of present[position] says that neighbour k exists
  int64_t at(int64_t i, int64_t j) const { return first + i * pitch + j; }
};

inline RingStencil ring_of(const Problem& p) { return ring_stencil(p.channels, p.channel_radius, p.self_loops); }
inline LatticeStencil lattice_of(const Problem& p) {
  return lattice_stencil(p.grid_h, p.grid_w, p.spatial_neighbors, p.self_loops);
}

template <class L>
Branch<L> ring_branch(const Problem& p, Arena& arena) {
  const RingStencil stencil = ring_of(p);
  Branch<L> b{};
  b.rows = 1;
  b.cols = b.span = b.pitch = p.channels;
  b.wraps = true;
  b.margin = larger(-stencil.lo, stencil.hi);
  b.first = round_up(b.margin, kLine);
  b.size = b.first + round_up(p.channels, kLine) + b.margin + kLine;
  b.count = stencil.count();
  b.offsets = arena.take<int64_t>(b.count);
  return b;
}
template <class L>
void fill_ring(const Branch<L>& b, const Problem& p) {
  const RingStencil stencil = ring_of(p);
  for (int64_t k = 0; k < b.count; ++k) b.offsets[k] = stencil.offset(k);
}

template <class L>
Branch<L> lattice_branch(const Problem& p, Arena& arena) {
  Branch<L> b{};
  b.rows = p.grid_h;
  b.cols = p.grid_w;
  b.pitch = p.grid_w + 2;
  b.first = b.pitch + 1;
  b.span = (b.rows - 1) * b.pitch + b.cols;
  b.size = (b.rows + 2) * b.pitch + 2 * kLine;
  b.count = lattice_of(p).count;
  b.offsets = arena.take<int64_t>(b.count);
  b.present = arena.take<typename L::I>(b.size);
  return b;
}
template <class L>
void fill_lattice(const Branch<L>& b, const Problem& p) {
  using I = typename L::I;
  const LatticeStencil stencil = lattice_of(p);
  memset(b.present, 0, sizeof(I) * static_cast<size_t>(b.size));
  for (int64_t k = 0; k < b.count; ++k) {
    const int64_t dr = stencil.dr[k], dc = stencil.dc[k];
    b.offsets[k] = dr * b.pitch + dc;
    for (int64_t i = larger<int64_t>(0, -dr); i < smaller(b.rows, b.rows - dr); ++i) {
      for (int64_t j = larger<int64_t>(0, -dc); j < smaller(b.cols, b.cols - dc); ++j) {
        b.present[b.at(i, j)] |= I{1} << k;
      }
    }
  }
}

// Positions in a block of nodes. A task takes a block, and each block has its own partial sums.
constexpr int64_t kNodeBlock = 256;

struct Positions {
  int64_t begin, end;
};
template <class L>
int64_t node_blocks(const Branch<L>& branch) {
  return (branch.span + kNodeBlock - 1) / kNodeBlock;
}
template <class L>
Positions node_block(const Branch<L>& branch, int64_t block) {
  const int64_t begin = branch.first + block * kNodeBlock;
  return {begin, smaller(begin + kNodeBlock, branch.first + branch.span)};
}

// The neighbourhoods of L::kLanes consecutive positions. K is the number of neighbours if the compiler knows it, else
// 0.
template <class L, int K>
struct RingNodes {
  const typename L::A* at;
  const Branch<L>* branch;
  int64_t left;  // nodes from the first of the positions on
  STEAM_INLINE int64_t count() const { return K ? K : branch->count; }
  STEAM_INLINE typename L::V token(int64_t k) const { return load(at + branch->offsets[k]); }
  STEAM_INLINE typename L::M exists(int64_t) const { return typename L::M{} == typename L::M{}; }
  STEAM_INLINE typename L::M is_node() const { return L::first(left < L::kLanes ? left : L::kLanes); }
  static STEAM_INLINE RingNodes make(const Branch<L>& b, const typename L::A* tokens, int64_t position) {
    return {tokens + position, &b, b.first + b.span - position};
  }
};

template <class L, int K>
struct LatticeNodes {
  const typename L::A* at;
  const Branch<L>* branch;
  typename L::M bits;  // Branch::present
  STEAM_INLINE int64_t count() const { return K ? K : branch->count; }
  STEAM_INLINE typename L::V token(int64_t k) const { return load(at + branch->offsets[k]); }
  STEAM_INLINE typename L::M exists(int64_t k) const { return (bits & (typename L::M{} + (1 << k))) != 0; }
  STEAM_INLINE typename L::M is_node() const { return bits != 0; }
  static STEAM_INLINE LatticeNodes make(const Branch<L>& b, const typename L::A* tokens, int64_t position) {
    typename L::M bits;
    __builtin_memcpy(&bits, b.present + position, sizeof(bits));
    return {tokens + position, &b, bits};
  }
};

// The numbers of one branch of one sample, in arrays of branch.size: tokens, pre-activations and gates.
template <class L>
struct Nodes {
  typename L::A *token, *o, *gate;
  Nodes(const Branch<L>& branch, Arena& arena)
      : token(arena.take<typename L::A>(branch.size)),
        o(arena.take<typename L::A>(branch.size)),
        gate(arena.take<typename L::A>(branch.size)) {}
};

// Fills the places around the nodes, after the tokens of the nodes: with the other end of a ring, elsewhere with zeros.
template <class L>
void surround(const Branch<L>& branch, typename L::A* tokens) {
  using A = typename L::A;
  const int64_t first = branch.first, n = branch.cols;
  if (branch.wraps) {
    for (int64_t i = first + n + branch.margin; i < branch.size; ++i) tokens[i] = 0;
    for (int64_t j = 0; j < branch.margin; ++j) {
      tokens[first - 1 - j] = tokens[first + n - 1 - j];
      tokens[first + n + j] = tokens[first + j];
    }
    return;
  }
  for (int64_t i = 0; i < first; ++i) tokens[i] = 0;
  for (int64_t i = 0; i + 1 < branch.rows; ++i) {
    for (int64_t j = n; j < branch.pitch; ++j) tokens[first + i * branch.pitch + j] = A{0};
  }
  for (int64_t i = first + branch.span; i < branch.size; ++i) tokens[i] = 0;
}

// Copies the numbers of the nodes from rows without gaps into an array of the branch, and back.
template <class L>
void scatter_nodes(const Branch<L>& branch, const typename L::A* dense, typename L::A* array) {
  for (int64_t i = 0; i < branch.rows; ++i) {
    memcpy(array + branch.at(i, 0), dense + i * branch.cols, sizeof(*dense) * static_cast<size_t>(branch.cols));
  }
}
template <class L>
void gather_nodes(const Branch<L>& branch, const typename L::A* array, typename L::A* dense) {
  for (int64_t i = 0; i < branch.rows; ++i) {
    memcpy(dense + i * branch.cols, array + branch.at(i, 0), sizeof(*dense) * static_cast<size_t>(branch.cols));
  }
}

}  // namespace
}  // namespace steam
