#if defined(__x86_64__)
#define LEVEL avx512
#define LEVEL_NAME "avx512"
#define LEVEL_LANES 8
#include <immintrin.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#include "tiles.h"
#endif
