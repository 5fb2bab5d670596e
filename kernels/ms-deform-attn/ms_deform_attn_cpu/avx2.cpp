// The kernel for machines with AVX2.
#if defined(__x86_64__)

#define ISA avx2
#define LANES 8

// The target is set for the whole file: a target on single functions would not apply to the templates that they use.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "body.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
