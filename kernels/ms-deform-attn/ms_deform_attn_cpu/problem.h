// The inputs and outputs of a call as plain pointers and sizes, and the functions that each instruction set provides.
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
  const void* value;        // float or bfloat16, (B, S, H, D), or a copy (B, H, S, D), which uses the cache better
  int64_t token_stride, head_stride;  // distances in value, in numbers
  const void* locations;    // (B, Q, H, L, P, 2) sampling locations, or offsets around the references
  const void* weights;      // (B, Q, H, L, P) attention weights, or logits with references
  const float* references;  // (B, Q, L, reference_size)
  int64_t reference_size;   // 0: none; 2: points, offsets in cells; 4: boxes, offsets in box sizes / (2 P)
  bool locations_are_bfloat16, weights_are_bfloat16;
  void* out;   // (B, Q, H, D) in the type of value
  float* lse;  // (B, Q, H) log of the softmax's sum; only with references

  // Backward only. grad_locations and grad_weights have the types of locations and weights.
  const void* grad_out;  // (B, Q, H, D) in the type of value
  float* out_dot_grad;   // (B, Q, H) sum over D of out * grad_out; the backward pass of softmax subtracts it
  float* grad_value;     // (B, S, H, D), zero at the start
  void* grad_locations;
  void* grad_weights;
};

// Number of queries of one image and head in a task of the forward pass.
constexpr int64_t chunk_size = 128;
inline int64_t forward_chunks(const Problem& problem) { return (problem.queries + chunk_size - 1) / chunk_size; }

// Floats of scratch memory per thread, enough for up to 16 lanes: at most 24 numbers for each point or pair of a block.
inline int64_t scratch_size(const Problem& problem) {
  const int64_t forward_points = (problem.levels * problem.points + 15) / 16 * 16;
  const int64_t backward_pairs = (problem.points + 63) / 64 * 64;
  return 24 * (forward_points > backward_pairs ? forward_points : backward_pairs);
}

// The functions of an instruction set. Threads take ranges of tasks: `forward` has B * H * forward_chunks tasks, `dot` B * Q,
// and `backward` B * H * L. Each task of `backward` owns a part of grad_value, so the order of threads does not change a bit.
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
