// Stands for torch's header: of one stream there is nothing to remember.
#pragma once

#include <c10/core/Allocator.h>

#include "CUDAStream.h"

namespace c10::cuda::CUDACachingAllocator {

inline void recordStream(const c10::DataPtr&, CUDAStream) {}

}  // namespace c10::cuda::CUDACachingAllocator
