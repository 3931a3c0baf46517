// Whatever every processor of this kind has: SSE2 on x86-64.
#define LEVEL baseline
#define LEVEL_NAME "baseline"
#include "ops.h"
