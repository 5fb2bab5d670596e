// Forward and backward for one instruction set. A file that includes this header defines ISA (the name) and LANES (the number
// of floats per vector: 16, 8 or 4).
//
// Two ideas make it fast:
// 1. Coordinates are computed for LANES points at a time. The result is a list of rows and weights for the four corners of
//    each point. Corners outside the map get weight zero and a valid row index. The forward pass skips them rather than
//    multiplies by zero, because 0 * inf is NaN. The backward pass reads them, then drops their products.
// 2. A task of the backward pass is one image, head and level. Tasks write to different rows of grad_value. So there are no
//    atomic operations, and the number of threads does not change a bit.
#include "problem.h"
#include "vectors.h"

namespace {

using msda::Bfloat16;
using msda::Problem;

// The four corners of LANES points: their rows (tokens), the fractions between them, and which corners are on the map.
struct Corners {
  Ints row[4];  // top left, top right, bottom left, bottom right
  Ints left, right, top, bottom;
  Floats fx, fy;

  INLINE_METHOD Ints inside(int corner) const { return (corner & 1 ? right : left) & (corner & 2 ? bottom : top); }
  INLINE_METHOD Floats share(int corner) const {
    const Floats x = corner & 1 ? fx : 1.0f - fx;
    const Floats y = corner & 2 ? fy : 1.0f - fy;
    return keep(inside(corner), x * y);
  }
};

INLINE Ints floor_to_int(Floats x) {
  const Ints truncated = __builtin_convertvector(x, Ints);
  return truncated + (__builtin_convertvector(truncated, Floats) > x);  // a true comparison is -1
}

// Corners of points at x and y in cells, counted from the centre of the first cell. Points that touch no cell (also NaN and
// infinity) are moved to the first cell before the conversion to integers, which would be undefined.
INLINE Corners locate(Floats x, Floats y, Floats width, Floats height, Ints first) {
  const Ints touches = (x > -1.0f) & (x < width) & (y > -1.0f) & (y < height);
  x = keep(touches, x);
  y = keep(touches, y);
  const Ints columns = __builtin_convertvector(width, Ints), lines = __builtin_convertvector(height, Ints);
  const Ints x0 = floor_to_int(x), y0 = floor_to_int(y);
  Corners at;
  at.fx = x - __builtin_convertvector(x0, Floats);
  at.fy = y - __builtin_convertvector(y0, Floats);
  at.left = touches & (x0 >= 0);
  at.right = touches & (x0 + 1 < columns);
  at.top = touches & (y0 >= 0);
  at.bottom = touches & (y0 + 1 < lines);
  const Ints x_left = x0 & ~(x0 < 0), x_right = x0 - (x0 + 1 < columns);
  const Ints y_top = first + (y0 & ~(y0 < 0)) * columns, y_bottom = first + (y0 - (y0 + 1 < lines)) * columns;
  at.row[0] = y_top + x_left;
  at.row[1] = y_top + x_right;
  at.row[2] = y_bottom + x_left;
  at.row[3] = y_bottom + x_right;
  return at;
}

// Coordinates are base + scale * location in all three forms of the operator.
struct Frame {
  float base_x, base_y, scale_x, scale_y;
};

INLINE Frame frame_of(const Problem& problem, int64_t batch_query, int64_t level) {
  const float height = static_cast<float>(problem.shapes[2 * level]), width = static_cast<float>(problem.shapes[2 * level + 1]);
  if (problem.reference_size == 0) return {-0.5f, -0.5f, width, height};
  const float* reference = problem.references + (batch_query * problem.levels + level) * problem.reference_size;
  Frame frame = {reference[0] * width - 0.5f, reference[1] * height - 0.5f, 1.0f, 1.0f};
  if (problem.reference_size == 4) {
    const float half = 0.5f / static_cast<float>(problem.points);
    frame.scale_x = reference[2] * half * width;
    frame.scale_y = reference[3] * half * height;
  }
  return frame;
}

template <typename T>
INLINE void gather_part(const T* value, int64_t stride, const int32_t* rows, const float* shares, int64_t padded, int64_t count,
                        T* out, int64_t dim) {
  Floats total = {};
  for (int64_t corner = 0; corner < 4; ++corner)
    for (int64_t i = corner * padded; i < corner * padded + count; ++i)
      if (shares[i] != 0) total += shares[i] * load_part(value + rows[i] * stride, dim);
  store_part(out, total, dim);
}

template <int N, typename T>
INLINE void gather(const T* value, int64_t stride, const int32_t* rows, const float* shares, int64_t padded, int64_t count,
                   T* out) {
  Floats upper[N] = {}, lower[N] = {};  // two sums: in a single sum, each addition would wait for the one before
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t corner = 0; corner < 4; ++corner) {
      const float share = shares[corner * padded + i];
      if (share == 0) continue;
      const T* row = value + rows[corner * padded + i] * stride;
      Floats* total = corner < 2 ? upper : lower;
      for (int k = 0; k < N; ++k) total[k] += share * load(row + k * LANES);
    }
  }
  for (int k = 0; k < N; ++k) store(out + k * LANES, upper[k] + lower[k]);
}

template <typename T>
INLINE void read(const void* from, int64_t offset, int64_t count, float* to) {
  const T* start = static_cast<const T*>(from) + offset;
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(start[i]);
}

template <typename T>
INLINE void read_pairs(const void* from, int64_t offset, int64_t count, float* x, float* y) {
  const T* start = static_cast<const T*>(from) + 2 * offset;
  for (int64_t i = 0; i < count; ++i) {
    x[i] = to_float(start[2 * i]);
    y[i] = to_float(start[2 * i + 1]);
  }
}

// Turns logits into weights, in place; returns the log of their sum.
INLINE float softmax(float* logits, int64_t padded) {
  Floats highest = load(logits);
  for (int64_t i = LANES; i < padded; i += LANES) highest = select(load(logits + i) > highest, load(logits + i), highest);
  const float shift = largest(highest);
  Floats total = {};
  for (int64_t i = 0; i < padded; i += LANES) {
    const Floats power = exp_of_negative(load(logits + i) - shift);
    store(logits + i, power);
    total += power;
  }
  const float norm = sum(total), inverse = 1.0f / norm;
  for (int64_t i = 0; i < padded; i += LANES) store(logits + i, load(logits + i) * inverse);
  return shift + log_of(norm);
}

template <typename T>
void forward_range(const Problem& problem, int64_t begin, int64_t end, float* scratch) {
  const int64_t count = problem.levels * problem.points, padded = (count + LANES - 1) / LANES * LANES;
  float *width = scratch, *height = width + padded;
  float *base_x = height + padded, *base_y = base_x + padded, *scale_x = base_y + padded, *scale_y = scale_x + padded;
  float *x = scale_y + padded, *y = x + padded, *weight = y + padded, *shares = weight + padded;
  int32_t *first = reinterpret_cast<int32_t*>(shares + 4 * padded), *rows = first + padded;
  __builtin_memset(scratch, 0, 18 * padded * sizeof(float));

  for (int64_t level = 0, start = 0, i = 0; level < problem.levels; ++level) {
    for (int64_t point = 0; point < problem.points; ++point, ++i) {
      height[i] = static_cast<float>(problem.shapes[2 * level]);
      width[i] = static_cast<float>(problem.shapes[2 * level + 1]);
      first[i] = static_cast<int32_t>(start);
    }
    start += problem.shapes[2 * level] * problem.shapes[2 * level + 1];
  }
  const int64_t num_chunks = msda::forward_chunks(problem), stride = problem.token_stride;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t chunk = task % num_chunks, head = task / num_chunks % problem.heads, batch = task / num_chunks / problem.heads;
    const T* value =
        static_cast<const T*>(problem.value) + batch * problem.tokens * problem.heads * problem.dim + head * problem.head_stride;
    const int64_t first_query = chunk * msda::chunk_size, last_query = first_query + msda::chunk_size;
    for (int64_t query = first_query; query < last_query && query < problem.queries; ++query) {
      const int64_t batch_query = batch * problem.queries + query, batch_query_head = batch_query * problem.heads + head;
      for (int64_t level = 0, i = 0; level < problem.levels; ++level) {
        const Frame frame = frame_of(problem, batch_query, level);
        for (int64_t point = 0; point < problem.points; ++point, ++i) {
          base_x[i] = frame.base_x;
          base_y[i] = frame.base_y;
          scale_x[i] = frame.scale_x;
          scale_y[i] = frame.scale_y;
        }
      }
      if (problem.locations_are_bfloat16) read_pairs<Bfloat16>(problem.locations, batch_query_head * count, count, x, y);
      else read_pairs<float>(problem.locations, batch_query_head * count, count, x, y);
      if (problem.weights_are_bfloat16) read<Bfloat16>(problem.weights, batch_query_head * count, count, weight);
      else read<float>(problem.weights, batch_query_head * count, count, weight);
      if (problem.reference_size) {
        for (int64_t i = count; i < padded; ++i) weight[i] = -__builtin_inff();  // padding of the vector gets weight zero
        problem.lse[batch_query_head] = softmax(weight, padded);
      }
      for (int64_t i = 0; i < padded; i += LANES) {
        const Corners at = locate(load(base_x + i) + load(scale_x + i) * load(x + i),
                                  load(base_y + i) + load(scale_y + i) * load(y + i),
                                  load(width + i), load(height + i), load_int(first + i));
        for (int corner = 0; corner < 4; ++corner) {
          store_int(rows + corner * padded + i, at.row[corner]);
          store(shares + corner * padded + i, keep(at.inside(corner), load(weight + i) * at.share(corner)));
        }
      }
      T* out = static_cast<T*>(problem.out) + batch_query_head * problem.dim;
      int64_t d = 0;
      for (; d + 4 * LANES <= problem.dim; d += 4 * LANES) gather<4>(value + d, stride, rows, shares, padded, count, out + d);
      for (; d + 2 * LANES <= problem.dim; d += 2 * LANES) gather<2>(value + d, stride, rows, shares, padded, count, out + d);
      for (; d + LANES <= problem.dim; d += LANES) gather<1>(value + d, stride, rows, shares, padded, count, out + d);
      if (d < problem.dim) gather_part(value + d, stride, rows, shares, padded, count, out + d, problem.dim - d);
    }
  }
}

template <typename T>
void dot_range(const Problem& problem, int64_t begin, int64_t end) {
  const T* out = static_cast<const T*>(problem.out);
  const T* grad_out = static_cast<const T*>(problem.grad_out);
  for (int64_t index = begin * problem.heads; index < end * problem.heads; ++index) {
    const int64_t start = index * problem.dim;
    Floats total = {};
    int64_t d = 0;
    for (; d + LANES <= problem.dim; d += LANES) total += load(out + start + d) * load(grad_out + start + d);
    if (d < problem.dim)
      total += load_part(out + start + d, problem.dim - d) * load_part(grad_out + start + d, problem.dim - d);
    problem.out_dot_grad[index] = sum(total);
  }
}

// Adds gradients to N * LANES numbers of four rows. Returns the dot product of each row with the gradient.
template <int N, typename T>
INLINE Four scatter(const T* value, float* grad_value, int64_t stride, const int32_t* rows, const float* shares, int64_t padded,
                    const Floats* grad_out) {
  Floats dot[4];
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t row = rows[corner * padded] * stride;
    const float share = shares[corner * padded];
    Floats total = {};
    for (int k = 0; k < N; ++k) {
      total += grad_out[k] * load(value + row + k * LANES);
      store(grad_value + row + k * LANES, load(grad_value + row + k * LANES) + share * grad_out[k]);
    }
    dot[corner] = total;
  }
  return sums(dot[0], dot[1], dot[2], dot[3]);
}

template <typename T>
INLINE Four scatter_part(const T* value, float* grad_value, int64_t stride, const int32_t* rows, const float* shares,
                         int64_t padded, Floats grad_out, int64_t dim) {
  Floats dot[4];
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t row = rows[corner * padded] * stride;
    dot[corner] = grad_out * load_part(value + row, dim);
    store_part(grad_value + row, load_part(grad_value + row, dim) + shares[corner * padded] * grad_out, dim);
  }
  return sums(dot[0], dot[1], dot[2], dot[3]);
}

// A block of queries with all points of one level. Each array has `padded` places, one for each pair of a query and a point.
struct Block {
  float *x, *y, *scale_x, *scale_y, *weight, *out_dot_grad, *fx, *fy, *shares, *dots;
  int32_t *rows, *inside;
  int64_t padded;
};

INLINE void add_dots(const Block& block, int64_t pair, Four dots) {
  for (int corner = 0; corner < 4; ++corner) block.dots[corner * block.padded + pair] += dots[corner];
}

// Handles all points of a block for N * LANES numbers of each query; if N is 0, for fewer than LANES numbers.
template <int N, typename T>
INLINE void scatter_block(const Problem& problem, const Block& block, const T* value, float* grad_value, const T* grad_out,
                          int64_t num_queries, int64_t dim) {
  const int64_t stride = problem.heads * problem.dim;
  for (int64_t query = 0, pair = 0; query < num_queries; ++query, grad_out += stride) {
    Floats gradient[N ? N : 1];
    if (N)
      for (int k = 0; k < N; ++k) gradient[k] = load(grad_out + k * LANES);
    else
      gradient[0] = load_part(grad_out, dim);
    for (int64_t point = 0; point < problem.points; ++point, ++pair) {
      const int32_t* rows = block.rows + pair;
      const float* shares = block.shares + pair;
      if (N) add_dots(block, pair, scatter<N ? N : 1>(value, grad_value, stride, rows, shares, block.padded, gradient));
      else add_dots(block, pair, scatter_part(value, grad_value, stride, rows, shares, block.padded, gradient[0], dim));
    }
  }
}

// Calls the function with two values: the first has the type of the locations, the second the type of the weights.
template <typename Function>
INLINE void with_types(const Problem& problem, Function function) {
  if (problem.locations_are_bfloat16) {
    problem.weights_are_bfloat16 ? function(Bfloat16{}, Bfloat16{}) : function(Bfloat16{}, float{});
  } else {
    problem.weights_are_bfloat16 ? function(float{}, Bfloat16{}) : function(float{}, float{});
  }
}

template <typename TLocation, typename TWeight>
INLINE void read_block(const Problem& problem, const Block& block, int64_t batch, int64_t head, int64_t level, int64_t begin,
                       int64_t num_queries) {
  int64_t pair = 0;
  for (int64_t query = begin; query < begin + num_queries; ++query) {
    const int64_t batch_query = batch * problem.queries + query, batch_query_head = batch_query * problem.heads + head;
    const Frame frame = frame_of(problem, batch_query, level);
    const int64_t offset = (batch_query_head * problem.levels + level) * problem.points;
    const TLocation* location = static_cast<const TLocation*>(problem.locations) + 2 * offset;
    const TWeight* weight = static_cast<const TWeight*>(problem.weights) + offset;
    const float lse = problem.reference_size ? problem.lse[batch_query_head] : 0;
    const float out_dot_grad = problem.reference_size ? problem.out_dot_grad[batch_query_head] : 0;
    for (int64_t point = 0; point < problem.points; ++point, ++pair) {
      block.x[pair] = frame.base_x + frame.scale_x * to_float(location[2 * point]);
      block.y[pair] = frame.base_y + frame.scale_y * to_float(location[2 * point + 1]);
      block.scale_x[pair] = frame.scale_x;
      block.scale_y[pair] = frame.scale_y;
      block.weight[pair] = to_float(weight[point]) - lse;
      block.out_dot_grad[pair] = out_dot_grad;
    }
  }
}

template <typename TLocation, typename TWeight>
INLINE void write_block(const Problem& problem, const Block& block, int64_t batch, int64_t head, int64_t level, int64_t begin,
                        int64_t num_queries) {
  int64_t pair = 0;
  for (int64_t query = begin; query < begin + num_queries; ++query) {
    const int64_t batch_query_head = (batch * problem.queries + query) * problem.heads + head;
    const int64_t offset = (batch_query_head * problem.levels + level) * problem.points;
    TLocation* location = static_cast<TLocation*>(problem.grad_locations) + 2 * offset;
    TWeight* weight = static_cast<TWeight*>(problem.grad_weights) + offset;
    for (int64_t point = 0; point < problem.points; ++point, ++pair) {
      from_float(location + 2 * point, block.x[pair]);
      from_float(location + 2 * point + 1, block.y[pair]);
      from_float(weight + point, block.weight[pair]);
    }
  }
}

template <typename T>
void backward_range(const Problem& problem, int64_t begin, int64_t end, float* scratch) {
  const int64_t padded = (problem.points + 63) / 64 * 64, queries_per_block = padded / problem.points;
  const int64_t stride = problem.heads * problem.dim;
  Block block;
  block.padded = padded;
  float** const ones[] = {&block.x, &block.y, &block.scale_x, &block.scale_y, &block.weight, &block.out_dot_grad, &block.fx, &block.fy};
  float* next = scratch;
  for (float** one : ones) *one = next, next += padded;
  block.shares = next;
  block.dots = next + 4 * padded;
  block.rows = reinterpret_cast<int32_t*>(next + 8 * padded);
  block.inside = block.rows + 4 * padded;
  __builtin_memset(scratch, 0, 24 * padded * sizeof(float));

  for (int64_t task = begin; task < end; ++task) {
    const int64_t level = task % problem.levels, head = task / problem.levels % problem.heads;
    const int64_t batch = task / problem.levels / problem.heads;
    int64_t first = 0;
    for (int64_t i = 0; i < level; ++i) first += problem.shapes[2 * i] * problem.shapes[2 * i + 1];
    const Floats height = splat(static_cast<float>(problem.shapes[2 * level]));
    const Floats width = splat(static_cast<float>(problem.shapes[2 * level + 1]));
    const T* value = static_cast<const T*>(problem.value) + batch * problem.tokens * stride + head * problem.dim;
    float* grad_value = problem.grad_value + batch * problem.tokens * stride + head * problem.dim;

    for (int64_t query = 0; query < problem.queries; query += queries_per_block) {
      const int64_t left = problem.queries - query, num_queries = left < queries_per_block ? left : queries_per_block;
      const int64_t num_pairs = num_queries * problem.points;
      with_types(problem, [&](auto location, auto weight) {
        read_block<decltype(location), decltype(weight)>(problem, block, batch, head, level, query, num_queries);
      });
      for (int64_t i = 0; i < num_pairs; i += LANES) {
        Floats weight = load(block.weight + i);
        if (problem.reference_size) store(block.weight + i, weight = exp_of_negative(weight));
        const Corners at = locate(load(block.x + i), load(block.y + i), width, height, splat_int(static_cast<int32_t>(first)));
        store(block.fx + i, at.fx);
        store(block.fy + i, at.fy);
        for (int corner = 0; corner < 4; ++corner) {
          store_int(block.rows + corner * padded + i, at.row[corner]);
          store_int(block.inside + corner * padded + i, at.inside(corner));
          store(block.shares + corner * padded + i, keep(at.inside(corner), weight * at.share(corner)));
          store(block.dots + corner * padded + i, Floats{});
        }
      }
      const T* grad_out = static_cast<const T*>(problem.grad_out) + (batch * problem.queries + query) * stride + head * problem.dim;
      int64_t d = 0;
      for (; d + 4 * LANES <= problem.dim; d += 4 * LANES)
        scatter_block<4>(problem, block, value + d, grad_value + d, grad_out + d, num_queries, 0);
      for (; d + 2 * LANES <= problem.dim; d += 2 * LANES)
        scatter_block<2>(problem, block, value + d, grad_value + d, grad_out + d, num_queries, 0);
      for (; d + LANES <= problem.dim; d += LANES)
        scatter_block<1>(problem, block, value + d, grad_value + d, grad_out + d, num_queries, 0);
      if (d < problem.dim)
        scatter_block<0>(problem, block, value + d, grad_value + d, grad_out + d, num_queries, problem.dim - d);

      for (int64_t i = 0; i < num_pairs; i += LANES) {
        const Floats fx = load(block.fx + i), fy = load(block.fy + i), weight = load(block.weight + i);
        Floats dot[4];
        for (int corner = 0; corner < 4; ++corner)
          dot[corner] = keep(load_int(block.inside + corner * padded + i), load(block.dots + corner * padded + i));
        const Floats top = (1.0f - fx) * dot[0] + fx * dot[1], bottom = (1.0f - fx) * dot[2] + fx * dot[3];
        const Floats sample = (1.0f - fy) * top + fy * bottom;
        const Floats slope_x = (1.0f - fy) * (dot[1] - dot[0]) + fy * (dot[3] - dot[2]);
        store(block.x + i, weight * slope_x * load(block.scale_x + i));
        store(block.y + i, weight * (bottom - top) * load(block.scale_y + i));
        store(block.weight + i, problem.reference_size ? weight * (sample - load(block.out_dot_grad + i)) : sample);
      }
      with_types(problem, [&](auto location, auto weight) {
        write_block<decltype(location), decltype(weight)>(problem, block, batch, head, level, query, num_queries);
      });
    }
  }
}

void forward(const Problem& problem, bool value_is_bfloat16, int64_t begin, int64_t end, float* scratch) {
  value_is_bfloat16 ? forward_range<Bfloat16>(problem, begin, end, scratch) : forward_range<float>(problem, begin, end, scratch);
}

void dot(const Problem& problem, bool value_is_bfloat16, int64_t begin, int64_t end) {
  value_is_bfloat16 ? dot_range<Bfloat16>(problem, begin, end) : dot_range<float>(problem, begin, end);
}

void backward(const Problem& problem, bool value_is_bfloat16, int64_t begin, int64_t end, float* scratch) {
  value_is_bfloat16 ? backward_range<Bfloat16>(problem, begin, end, scratch) : backward_range<float>(problem, begin, end, scratch);
}

}  // namespace

#define NAME_OF(isa) #isa
#define FUNCTIONS(isa) const msda::Functions msda::isa = {NAME_OF(isa), forward, dot, backward}
FUNCTIONS(ISA);
