// Stands for csrc/torch/cpu.cpp: there are no kernels for the CPU here.
namespace fusedloss {

const char* cpu_capability() { return "none: CUDA kernels are emulated"; }

}  // namespace fusedloss
