// What one call computes, as plain pointers and sizes, and the functions that each instruction set offers for it.
//
// The letters: B images, S tokens of all levels, H heads, D numbers per head, Q queries, L levels, P points.
#pragma once

#include <stdint.h>

namespace msda {

struct Bfloat16 {
  uint16_t bits;
};

struct Problem {
  int64_t batch, tokens, heads, dim, queries, levels, points;
  const int64_t* shapes;    // (L, 2) height and width
  const void* value;        // float or bfloat16, (B, S, H, D) or, copied for the sake of the cache, (B, H, S, D):
  int64_t token_stride, head_stride;  // distances in it
  const void* locations;    // (B, Q, H, L, P, 2) sampling locations, or offsets around the references
  const void* weights;      // (B, Q, H, L, P) attention weights, or logits where there are references
  const float* references;  // (B, Q, L, reference_size)
  int64_t reference_size;   // 0: none; 2: points, offsets in cells; 4: boxes, offsets in half boxes per P
  bool locations_are_bfloat16, weights_are_bfloat16;
  void* out;   // (B, Q, H, D) as value
  float* lse;  // (B, Q, H) log of the softmax's sum, where there are references

  // Backward only. grad_locations and grad_weights have the types of locations and weights.
  const void* grad_out;  // (B, Q, H, D) as value
  float* out_dot_grad;   // (B, Q, H) sum over D of out * grad_out, which is what softmax's backward subtracts
  float* grad_value;     // (B, S, H, D), zero at the start
  void* grad_locations;
  void* grad_weights;
};

// Queries of one image and head that are one task of the forward pass.
constexpr int64_t chunk_size = 128;
inline int64_t forward_chunks(const Problem& problem) { return (problem.queries + chunk_size - 1) / chunk_size; }

// Floats of scratch memory per thread, for any number of lanes up to 16: at most 24 numbers for each of the points or pairs that are
// handled together.
inline int64_t scratch_size(const Problem& problem) {
  const int64_t forward_points = (problem.levels * problem.points + 15) / 16 * 16;
  const int64_t backward_pairs = (problem.points + 63) / 64 * 64;
  return 24 * (forward_points > backward_pairs ? forward_points : backward_pairs);
}

// One set of functions for each instruction set. Ranges make them parallel: `forward` over B * H * forward_chunks, `dot` over
// B * Q, `backward` over B * H * L, each of which owns its part of grad_value, so that no order of threads changes a bit.
struct Functions {
  const char* name;
  void (*forward)(const Problem&, bool value_is_bfloat16, int64_t begin, int64_t end, float* scratch);
  void (*dot)(const Problem&, bool value_is_bfloat16, int64_t begin, int64_t end);
  void (*backward)(const Problem&, bool value_is_bfloat16, int64_t begin, int64_t end, float* scratch);
};

extern const Functions baseline;
#if defined(__x86_64__)
extern const Functions avx2;
extern const Functions avx512;
#endif

}  // namespace msda
