// The CPU kernel as torch operators with torch's stable ABI: one binary works with every torch from 2.11 on.
//
// The Python code has already checked shapes and types, made all tensors contiguous and allocated the results. The checks in
// this file keep a direct call from reading beyond a tensor.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "problem.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The functions with this number of lanes; 0: the best ones for this machine. Null if the machine does not support them.
const msda::Functions* functions_for(int64_t lanes) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (lanes == 0 || lanes == 16)) return &msda::avx512;
  if (has_avx2 && (lanes == 0 || lanes == 8)) return &msda::avx2;
#endif
  return lanes == 0 || lanes == 4 ? &msda::baseline : nullptr;
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error("ms_deform_attn: " + message);
}

bool is_bfloat16(const Tensor& tensor, const char* name) {
  require(tensor.is_cpu() && tensor.is_contiguous(), std::string(name) + " must be a contiguous CPU tensor.");
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16, std::string(name) + " must be float32 or bfloat16.");
  return type == ScalarType::BFloat16;
}

void require_float(const Tensor& tensor, const char* name) {
  require(!is_bfloat16(tensor, name), std::string(name) + " must be float32.");
}

void require_size(const Tensor& tensor, int64_t size, const char* name) {
  require(tensor.numel() == size, std::string(name) + " has " + std::to_string(tensor.numel()) + " numbers where " +
                                      std::to_string(size) + " are expected.");
}

msda::Problem describe(const Tensor& value, const Tensor& shapes, const Tensor& references, const Tensor& locations,
                       const Tensor& weights, const Tensor& lse) {
  require(value.dim() == 4 && weights.dim() == 5, "value must have 4 dimensions and weights 5.");
  require(shapes.is_cpu() && shapes.is_contiguous() && shapes.scalar_type() == ScalarType::Long, "shapes must be int64 on CPU.");
  msda::Problem problem = {};
  problem.batch = value.size(0);
  problem.tokens = value.size(1);
  problem.heads = value.size(2);
  problem.dim = value.size(3);
  problem.queries = weights.size(1);
  problem.levels = weights.size(3);
  problem.points = weights.size(4);
  require_size(shapes, 2 * problem.levels, "shapes");
  problem.shapes = static_cast<const int64_t*>(shapes.data_ptr());
  int64_t tokens = 0;
  for (int64_t level = 0; level < problem.levels; ++level) {
    const int64_t height = problem.shapes[2 * level], width = problem.shapes[2 * level + 1];
    require(height > 0 && width > 0 && height <= INT32_MAX && width <= INT32_MAX, "heights and widths must be at least 1.");
    tokens += height * width;
    require(tokens < INT32_MAX, "there are too many tokens.");
  }
  require(tokens == problem.tokens, "the levels do not add up to the tokens of value.");

  const int64_t per_level = problem.batch * problem.queries * problem.levels;
  require_size(weights, per_level * problem.heads * problem.points, "weights");
  require_size(locations, 2 * per_level * problem.heads * problem.points, "locations");
  require_float(references, "references");
  require_float(lse, "lse");
  if (references.numel() || lse.numel()) {
    problem.reference_size = references.size(references.dim() - 1);
    require(problem.reference_size == 2 || problem.reference_size == 4, "references must have 2 or 4 numbers each.");
    require_size(references, per_level * problem.reference_size, "references");
    require_size(lse, problem.batch * problem.queries * problem.heads, "lse");
  }
  problem.value = value.data_ptr();
  problem.token_stride = problem.heads * problem.dim;
  problem.head_stride = problem.dim;
  problem.references = static_cast<const float*>(references.data_ptr());
  problem.locations = locations.data_ptr();
  problem.locations_are_bfloat16 = is_bfloat16(locations, "locations");
  problem.weights = weights.data_ptr();
  problem.weights_are_bfloat16 = is_bfloat16(weights, "weights");
  problem.lse = static_cast<float*>(lse.data_ptr());
  return problem;
}

const msda::Functions& chosen(int64_t lanes) {
  const msda::Functions* functions = functions_for(lanes);
  require(functions, "this machine has no vectors of " + std::to_string(lanes) + " lanes.");
  return *functions;
}

// Copies value, (B, S, H, D) -> (B, H, S, D), and points `problem` to the copy. The tokens of a head are then side by side, so
// the two columns around a point are neighbours in memory, and an eighth of the pages are in use.
std::unique_ptr<char[]> group_by_head(msda::Problem& problem, int64_t item_size) {
  const int64_t row = problem.dim * item_size, tokens = problem.tokens, heads = problem.heads;
  std::unique_ptr<char[]> copy(new char[problem.batch * tokens * heads * row]);
  const char* from = static_cast<const char*>(problem.value);
  char* to = copy.get();
  torch::stable::parallel_for(0, problem.batch * tokens, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t head = 0; head < heads; ++head)
        std::memcpy(to + ((i / tokens * heads + head) * tokens + i % tokens) * row, from + (i * heads + head) * row, row);
  });
  problem.value = to;
  problem.token_stride = problem.dim;
  problem.head_stride = tokens * problem.dim;
  return copy;
}

void cpu_forward(Tensor value, Tensor shapes, Tensor references, Tensor locations, Tensor weights, Tensor out, Tensor lse,
                 int64_t lanes) {
  msda::Problem problem = describe(value, shapes, references, locations, weights, lse);
  const bool value_is_bfloat16 = is_bfloat16(value, "value");
  require(is_bfloat16(out, "out") == value_is_bfloat16, "out must have the type of value.");
  require_size(out, problem.batch * problem.queries * problem.heads * problem.dim, "out");
  problem.out = out.data_ptr();
  const msda::Functions& functions = chosen(lanes);
  // The copy pays off if each row is read many times: in the encoder, not in the decoder.
  const bool many_reads = 4 * problem.queries * problem.levels * problem.points > 16 * problem.tokens;
  std::unique_ptr<char[]> copy;
  if (many_reads && problem.heads > 1) copy = group_by_head(problem, value_is_bfloat16 ? 2 : 4);
  const int64_t num_tasks = problem.batch * problem.heads * msda::forward_chunks(problem);
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(msda::scratch_size(problem));
    functions.forward(problem, value_is_bfloat16, begin, end, scratch.data());
  });
}

void cpu_backward(Tensor value, Tensor shapes, Tensor references, Tensor locations, Tensor weights, Tensor out, Tensor lse,
                  Tensor grad_out, Tensor grad_value, Tensor grad_locations, Tensor grad_weights, int64_t lanes) {
  msda::Problem problem = describe(value, shapes, references, locations, weights, lse);
  const bool value_is_bfloat16 = is_bfloat16(value, "value");
  const int64_t size = problem.batch * problem.queries * problem.heads * problem.dim;
  require(is_bfloat16(out, "out") == value_is_bfloat16, "out must have the type of value.");
  require(is_bfloat16(grad_out, "grad_out") == value_is_bfloat16, "grad_out must have the type of value.");
  require(is_bfloat16(grad_locations, "grad_locations") == problem.locations_are_bfloat16, "grad_locations has another type.");
  require(is_bfloat16(grad_weights, "grad_weights") == problem.weights_are_bfloat16, "grad_weights has another type.");
  require_float(grad_value, "grad_value");
  require_size(out, size, "out");
  require_size(grad_out, size, "grad_out");
  require_size(grad_value, value.numel(), "grad_value");
  require_size(grad_locations, locations.numel(), "grad_locations");
  require_size(grad_weights, weights.numel(), "grad_weights");
  std::vector<float> out_dot_grad(problem.reference_size ? problem.batch * problem.queries * problem.heads : 0);
  problem.out = out.data_ptr();
  problem.grad_out = grad_out.data_ptr();
  problem.out_dot_grad = out_dot_grad.data();
  problem.grad_value = static_cast<float*>(grad_value.data_ptr());
  problem.grad_locations = grad_locations.data_ptr();
  problem.grad_weights = grad_weights.data_ptr();
  const msda::Functions& functions = chosen(lanes);
  if (problem.reference_size)
    torch::stable::parallel_for(0, problem.batch * problem.queries, 256, [&](int64_t begin, int64_t end) {
      functions.dot(problem, value_is_bfloat16, begin, end);
    });
  torch::stable::parallel_for(0, problem.batch * problem.heads * problem.levels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(msda::scratch_size(problem));
    functions.backward(problem, value_is_bfloat16, begin, end, scratch.data());
  });
}

// Floats in a vector of the best instruction set of this machine: 16 for AVX-512, 8 for AVX2, 4 otherwise.
int64_t cpu_lanes() { return functions_for(16) ? 16 : functions_for(8) ? 8 : 4; }

}  // namespace

// Two steps, so that the macro that names the library is expanded before it is pasted.
#define LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

LIBRARY(TORCH_EXTENSION_NAME, m) {
  m.def(
      "cpu_forward(Tensor value, Tensor shapes, Tensor references, Tensor locations, Tensor weights, Tensor(a!) out, "
      "Tensor(b!) lse, int lanes) -> ()");
  m.def(
      "cpu_backward(Tensor value, Tensor shapes, Tensor references, Tensor locations, Tensor weights, Tensor out, Tensor lse, "
      "Tensor grad_out, Tensor(a!) grad_value, Tensor(b!) grad_locations, Tensor(c!) grad_weights, int lanes) -> ()");
  m.def("cpu_lanes() -> int");
}

LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
}

LIBRARY_IMPL(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, m) { m.impl("cpu_lanes", TORCH_BOX(&cpu_lanes)); }
