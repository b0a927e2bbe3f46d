// The compiled losses of one's own that this process has loaded.
#pragma once

#include <string>
#include <string_view>

#include "cpu/custom_kernel.h"

namespace fusedloss {

// Loads a library for the operators' `loss` to name. Once for each name; it stays loaded.
void load_custom(const std::string& loss, const std::string& library);

// Throws for a loss that is not loaded.
const cpu::CustomKernel& custom_kernel(std::string_view loss);

}  // namespace fusedloss
