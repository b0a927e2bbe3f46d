// The compiled losses of one's own that this process has loaded.
#pragma once

#include <c10/util/ArrayRef.h>

#include <string>
#include <string_view>

namespace fusedloss {

// Loads a library, for whichever device it is, for the operators' `loss` to name. Once for each
// name; it stays loaded.
void load_custom(const std::string& loss, const std::string& library);

// A loss's cpu::CustomKernel or cuda::CustomKernel. Throws where none is loaded, and where it has
// not as many parameters.
template <class Kernel>
const Kernel& custom_kernel(std::string_view loss, c10::ArrayRef<double> parameters);

}  // namespace fusedloss
