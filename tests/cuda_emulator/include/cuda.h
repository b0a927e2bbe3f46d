// The functions of the CUDA driver that load kernels at run time, over the emulator. Machine code
// is a shared library there, of kernels that EMULATOR_LIBRARY_KERNEL names.
#pragma once

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_IMAGE = 200, CUDA_ERROR_NOT_FOUND = 500 };
enum CUjit_option {};
enum CUlibraryOption {};
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;

CUresult cuInit(unsigned flags);
CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* jit_options,
                           void** jit_values, unsigned jit_count, CUlibraryOption* options,
                           void** values, unsigned count);
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name);
