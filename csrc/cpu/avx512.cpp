#include "kernels.h"
#if defined(FASTDIFF_LEVELS)
#define LEVEL avx512
#define LEVEL_NAME "avx512"
#define LEVEL_LANES 8
// The library's headers come before the pragma: what they define must run on any processor.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <utility>
#include <vector>
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#include "ops.h"
#endif
