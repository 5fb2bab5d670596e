// The kernel for every machine: vectors of 16 bytes, on any architecture.
#define ISA baseline
#define LANES 4

#include "body.h"
