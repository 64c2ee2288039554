#include "cpu/pyramid_project_kernels.h"
