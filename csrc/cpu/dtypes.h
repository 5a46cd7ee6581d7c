// 16-bit floats as they are stored; arithmetic is in float. vector.h and scalar code convert them.
#pragma once

#include <cstdint>

namespace r2m {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

}  // namespace r2m
