#include "cpu/upsample_concat_kernels.h"
