#include "worker/trainer/torch/torch_status.h"
