// The kernel for machines with AVX-512. By default, GCC splits vectors of 64 bytes, so the target below prefers them.
#if defined(__x86_64__)

#define ISA avx512
#define LANES 16

// The target is set for the whole file: a target on single functions would not apply to the templates that they use.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif

#include "body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
