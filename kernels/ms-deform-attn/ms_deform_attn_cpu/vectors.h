// Vectors of LANES floats, with the vector extensions of GCC and clang, and functions on them.
//
// Do not include headers of the C++ library here or in body.h. The linker keeps one copy of each inline function, and could
// keep a copy compiled for AVX-512, which crashes on machines without AVX-512.
#pragma once

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define INLINE_METHOD inline __attribute__((always_inline))

namespace {

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

template <typename To, typename From>
INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

INLINE Floats splat(float x) { return x - Floats{}; }
INLINE Ints splat_int(int32_t x) { return x - Ints{}; }

// mask: -1 selects `a`, 0 selects `b`.
INLINE Floats select(Ints mask, Floats a, Floats b) {
  return bit_cast<Floats>((mask & bit_cast<Ints>(a)) | (~mask & bit_cast<Ints>(b)));
}
INLINE Floats keep(Ints mask, Floats a) { return bit_cast<Floats>(mask & bit_cast<Ints>(a)); }
INLINE Ints select_int(Ints mask, Ints a, Ints b) { return (mask & a) | (~mask & b); }

INLINE Floats load(const float* from) {
  Floats to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}
INLINE Floats load(const msda::Bfloat16* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof(halves));
  return bit_cast<Floats>(__builtin_convertvector(halves, Bits) << 16);
}
INLINE Ints load_int(const int32_t* from) {
  Ints to;
  __builtin_memcpy(&to, from, sizeof(to));
  return to;
}
INLINE void store(float* to, Floats from) { __builtin_memcpy(to, &from, sizeof(from)); }
INLINE void store_int(int32_t* to, Ints from) { __builtin_memcpy(to, &from, sizeof(from)); }

// To the nearest bfloat16, ties to even; NaN stays NaN.
INLINE void store(msda::Bfloat16* to, Floats from) {
  const Bits bits = bit_cast<Bits>(from);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40;
  const Ints is_nan = from != from;
  const Ints chosen = select_int(is_nan, bit_cast<Ints>(quiet), bit_cast<Ints>(rounded));
  const Halves halves = __builtin_convertvector(bit_cast<Bits>(chosen), Halves);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// Loads the first `count` numbers only, so as not to read beyond the end of a tensor. The other lanes are zero.
template <typename T>
INLINE Floats load_part(const T* from, int64_t count) {
  T buffer[LANES];
  __builtin_memset(buffer, 0, sizeof(buffer));
  __builtin_memcpy(buffer, from, count * sizeof(T));
  return load(buffer);
}
template <typename T>
INLINE void store_part(T* to, Floats from, int64_t count) {
  T buffer[LANES];
  store(buffer, from);
  __builtin_memcpy(to, buffer, count * sizeof(T));
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(msda::Bfloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
INLINE void from_float(float* to, float x) { *to = x; }
INLINE void from_float(msda::Bfloat16* to, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  to->bits = x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

#if defined(__clang__)
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, FourInts{i, j, k, l})
#endif

// Four sums: of the lanes 0, 4, 8, ..., of the lanes 1, 5, 9, ..., and so on. `sums` then finishes four vectors at a time.
INLINE Four fold(Floats x) {
  Four parts[LANES / 4];
  __builtin_memcpy(parts, &x, sizeof(x));
  Four total = parts[0];
  for (int i = 1; i < LANES / 4; ++i) total += parts[i];
  return total;
}

INLINE float sum(Floats x) {
  Four y = fold(x);
  y += SHUFFLE4(y, y, 2, 3, 0, 1);
  return y[0] + y[1];
}

INLINE Four larger(Four a, Four b) {
  const FourInts mask = a > b;
  return bit_cast<Four>((mask & bit_cast<FourInts>(a)) | (~mask & bit_cast<FourInts>(b)));
}

INLINE float largest(Floats x) {
  Four parts[LANES / 4];
  __builtin_memcpy(parts, &x, sizeof(x));
  Four y = parts[0];
  for (int i = 1; i < LANES / 4; ++i) y = larger(y, parts[i]);
  y = larger(y, SHUFFLE4(y, y, 2, 3, 0, 1));
  return y[0] > y[1] ? y[0] : y[1];
}

// (sum of a, sum of b, sum of c, sum of d)
INLINE Four sums(Floats a, Floats b, Floats c, Floats d) {
  const Four p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const Four pq = SHUFFLE4(p, q, 0, 4, 1, 5) + SHUFFLE4(p, q, 2, 6, 3, 7);  // p02 q02 p13 q13
  const Four rs = SHUFFLE4(r, s, 0, 4, 1, 5) + SHUFFLE4(r, s, 2, 6, 3, 7);
  return SHUFFLE4(pq, rs, 0, 1, 4, 5) + SHUFFLE4(pq, rs, 2, 3, 6, 7);
}

// exp(x) for x <= 0, with a relative error of about 1e-7. It is 0 for x below -87, and NaN for NaN.
INLINE Floats exp_of_negative(Floats x) {
  const Ints representable = ~(x <= splat(-87.0f));
  x = keep(representable, x);
  // The conversion rounds towards 0. As x <= 0, subtracting 0.5 makes it round to the nearest integer.
  const Ints power = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats whole = __builtin_convertvector(power, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts, |r| <= ln(2) / 2
  // Taylor to the seventh power: the next term is below 6e-9.
  Floats y = splat(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return keep(representable, y * bit_cast<Floats>((power + 127) << 23));
}

// Natural logarithm of a normal x > 0, with an error of about 1e-7; NaN for NaN. The C library's function would take longer
// than the rest of the softmax.
INLINE float log_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x) - 0x3f3504f3;  // counted from the square root of 1/2
  const float exponent = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float mantissa = bit_cast<float>((bits & 0x7fffff) + 0x3f3504f3);
  const float s = (mantissa - 1) / (mantissa + 1), t = s * s;  // |s| < 0.172: the first term left out is below 1e-9
  const float log_mantissa = 2 * s * (1 + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9)))));
  return x == x ? exponent * 0.693147181f + log_mantissa : x;
}

}  // namespace
