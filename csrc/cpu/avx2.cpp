#if defined(__x86_64__)
#define LEVEL avx2
#define LEVEL_NAME "avx2"
#define LEVEL_LANES 4
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#pragma GCC target("arch=x86-64-v3")
#include "tiles.h"
#endif
