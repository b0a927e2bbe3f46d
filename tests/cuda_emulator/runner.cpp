// Runs the calls of the CUDA engines that one file lists, over the memory that another holds and
// gets back; engines.py writes both.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "csrc/cuda/kernels.h"
#include "csrc/math/losses.h"
#include "emulator.h"

namespace {

using namespace fusedloss;

// Says why and ends the run.
void require(bool condition, const std::string& what) {
  if (condition) return;
  fprintf(stderr, "runner: %s\n", what.c_str());
  exit(1);
}

// Each buffer is an allocation of its own, so that its bounds are watched.
char* allocate(size_t bytes) {
  constexpr size_t kAlignment = 256;  // as cudaMalloc's
  void* memory = nullptr;
  require(posix_memalign(&memory, kAlignment, bytes) == 0, "no memory");
  memset(memory, 0xff, bytes);
  return static_cast<char*>(memory);
}

class Calls {
 public:
  Calls(const char* calls, const char* memory) : in_(calls) {
    std::ifstream data(memory, std::ios::binary);
    buffers_.resize(integer());
    for (Buffer& buffer : buffers_) {
      buffer.bytes = integer();
      buffer.memory = allocate(buffer.bytes);
      data.read(buffer.memory, buffer.bytes);
    }
    require(static_cast<bool>(data), "less memory than the calls list");
  }
  ~Calls() {
    for (const Buffer& buffer : buffers_) free(buffer.memory);
  }
  Calls(const Calls&) = delete;

  void run() {
    for (std::string engine; in_ >> engine;) {
      if (engine == "built_in") {
        run_built_in();
      } else if (engine == "custom") {
        run_custom();
      } else if (engine == "custom_rows") {
        run_custom_rows();
      } else if (engine == "teach") {
        teach();
      } else {
        require(false, "no engine is named " + engine);
      }
    }
  }

  void write(const char* memory) const {
    std::ofstream data(memory, std::ios::binary);
    for (const Buffer& buffer : buffers_) data.write(buffer.memory, buffer.bytes);
    require(static_cast<bool>(data), "the memory cannot be written");
  }

 private:
  struct Buffer {
    char* memory;
    size_t bytes;
  };
  std::ifstream in_;
  std::vector<Buffer> buffers_;
  static constexpr int kCapability = 90;
  static inline const cuda::Fault* fault_ = nullptr;  // of the call that runs

  std::string word() {
    std::string text;
    require(static_cast<bool>(in_ >> text), "a call lacks words");
    return text;
  }
  int64_t integer() { return std::stoll(word()); }
  double number() { return std::stod(word()); }
  template <class T>
  T* pointer() {
    const int64_t buffer = integer(), offset = integer();
    return buffer < 0 ? nullptr : reinterpret_cast<T*>(buffers_.at(buffer).memory + offset);
  }
  DType dtype() { return static_cast<DType>(integer()); }
  Operand operand(int dims) {
    Operand operand;
    operand.data = pointer<void>();
    operand.dtype = dtype();
    operand.contiguous = integer();
    operand.class_dim = static_cast<int>(integer());
    for (int d = 0; d < dims; ++d) operand.strides[d] = integer();
    return operand;
  }
  Output output() {
    Output output;
    output.data = pointer<void>();
    output.dtype = dtype();
    return output;
  }
  cuda::Launch launch() {
    cuda::Launch launch;
    launch.pass = static_cast<Pass>(integer());
    launch.loss = pointer<void>();
    launch.loss_dtype = dtype();
    launch.forward_state = pointer<double>();
    launch.normalizer = number();
    launch.prediction = pointer<double>();
    launch.grad_output = pointer<void>();
    launch.grad_output_dtype = dtype();
    launch.fresh = integer();
    launch.fault = pointer<cuda::Fault>();
    cuda::ClassWeights& count = launch.class_weights;
    count.indices = pointer<int64_t>();
    count.n = integer();
    count.classes = integer();
    count.ignore_index = integer();
    count.weight = pointer<void>();
    count.weight_is_double = integer();
    count.weight_is_of_rows = integer();
    count.divide_into_slices();
    return launch;
  }

  // The host may look for a fault at any time.
  static void look(const void* address) {
    if (address != fault_) return;
    const cuda::Fault& fault = *fault_;
    if (__atomic_load_n(&fault.state, __ATOMIC_RELAXED) != cuda::Fault::kReady) return;
    require(fault.what <= cuda::Fault::kTargetOutsideUnit && fault.position >= 0,
            "the host sees no fault that there could be");
  }

  // Backwards of another stream, as a pass meets them: each number of a prediction changes by
  // itself, once in `every` times that threads change places. Null: none is taught any more.
  struct Lessons {
    volatile double* prediction;
    unsigned every;
    std::vector<double> upstreams;
    std::minstd_rand random;
  };
  static inline Lessons lessons_;

  static void give_lesson() {
    auto& [prediction, every, upstreams, random] = lessons_;
    if (random() % every) return;
    constexpr int kConfidences = 4;
    if (random() % 2) {
      prediction[0] = upstreams[random() % upstreams.size()];
    } else {
      prediction[1] = random() % kConfidences;
    }
  }
  void teach() {
    lessons_.prediction = pointer<double>();
    lessons_.every = integer();
    lessons_.upstreams.resize(integer());
    for (double& upstream : lessons_.upstreams) upstream = number();
    emulator::meanwhile(lessons_.prediction ? give_lesson : nullptr);
  }

  // One workspace for all launches, as for those of a stream.
  template <class Kernel>
  static void run(const Kernel& kernel, const Call& call, cuda::Launch launch) {
    static char* const workspace = [] {
      char* const memory = allocate(cuda::workspace_bytes());
      return static_cast<char*>(memset(memory, 0, cuda::kWorkspaceCounterBytes));
    }();
    if (launch.loss) launch.workspace = workspace;
    fault_ = launch.fault;
    emulator::host_watches(look);
    const cudaError_t error = kernel(call, launch);
    require(error == cudaSuccess, cudaGetErrorString(error));
    const bool zero = std::all_of(workspace, workspace + cuda::kWorkspaceCounterBytes,
                                  [](char byte) { return byte == 0; });
    require(zero, "a kernel leaves counters that are not 0");
  }

  template <class Kernel>
  void run(const Kernel& kernel, const std::vector<double>& parameters) {
    Call call;
    call.parameters = parameters.data();
    call.compute_in_double = integer();
    call.ignore_index = integer();
    call.numel = integer();
    call.space.dims = static_cast<int>(integer());
    for (int d = 0; d < call.space.dims; ++d) call.space.sizes[d] = integer();
    for (Operand* operand :
         {&call.inputs[0], &call.inputs[1], &call.weight, &call.inputs[2], &call.upstream}) {
      *operand = this->operand(call.space.dims);
    }
    call.weight_sum = pointer<double>();
    for (Output* output : {&call.value, &call.gradients[0], &call.gradients[1]}) {
      *output = this->output();
    }
    for (int64_t& stride : call.gradients[0].strides) stride = integer();
    run(kernel, call, launch());
  }
  std::vector<double> parameters() {
    std::vector<double> parameters(integer());
    for (double& parameter : parameters) parameter = number();
    return parameters;
  }

  void run_built_in() {
    const std::vector<std::string> names = {
#define NAME(TEXT, LOSS) TEXT,
        FUSEDLOSS_POINTWISE_LOSSES(NAME)
#undef NAME
            "cross_entropy"};
    const auto found = std::find(names.begin(), names.end(), word());
    require(found != names.end(), "no such loss");
    run(cuda::kernels[found - names.begin()], parameters());
  }

  // A custom loss, by its library.
  void run_custom() {
    const std::string library = word();
    static auto& loaded = *new std::map<std::string, const cuda::CustomKernels*>;  // as they are
    const cuda::CustomKernels*& kernels = loaded[library];
    if (!kernels) kernels = cuda::load_custom(library.c_str(), kCapability, nullptr);
    const auto kernel = [&](const Call& call, const cuda::Launch& launch) {
      return cuda::run_custom(*kernels, call, launch);
    };
    run(kernel, parameters());
  }

  // A custom row loss, by its library.
  void run_custom_rows() {
    const std::string library = word();
    cuda::CustomRowsInfo info{static_cast<unsigned>(integer())};
    for (int* size : {&info.kept, &info.kept_narrow, &info.held, &info.held_narrow}) {
      *size = static_cast<int>(integer());
    }
    static auto& loaded = *new std::map<std::string, const cuda::CustomKernels*>;
    const cuda::CustomKernels*& kernels = loaded[library];
    if (!kernels) {
      kernels = cuda::load_custom_rows(library.c_str(), kCapability, info, nullptr);
    }
    const std::vector<double> parameters = this->parameters();
    Call call;
    call.parameters = parameters.data();
    call.compute_in_double = integer();
    call.ignore_index = integer();
    call.space.dims = 3;
    for (int d = 0; d < 3; ++d) call.space.sizes[d] = integer();
    const int64_t inputs = integer();
    for (int64_t i = 0; i < inputs; ++i) {
      call.inputs[i] = operand(3);
      call.gradients[i] = strided_output();
    }
    call.weight = operand(3);
    call.upstream = operand(3);
    call.value = output();
    const int64_t auxiliary = integer();
    for (int64_t i = 0; i < auxiliary; ++i) call.auxiliary[i] = output();
    const auto kernel = [&](const Call& c, const cuda::Launch& launch) {
      return cuda::run_custom_rows(*kernels, c, launch);
    };
    run(kernel, call, launch());
  }
  Output strided_output() {
    Output output = this->output();
    for (int64_t& stride : output.strides) stride = integer();
    return output;
  }
};

}  // namespace

int main(int, char** arguments) {
  Calls calls(arguments[1], arguments[2]);
  calls.run();
  calls.write(arguments[2]);
}
