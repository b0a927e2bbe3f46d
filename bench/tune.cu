// Which plan of rows_held is the fastest on this GPU, and whether the kernels agree; no torch.
//
//   tune FILE [ROUNDS [DTYPE ROWS CLASSES]...]
//     times every plan of each shape, and writes those that beat the default to a file like
//     csrc/cuda/plans.inc, in which it leaves the lines of other GPUs and shapes as they are
//   tune --check
//     runs each kernel once over small shapes, for the sanitizers, and compares the results
//   tune --device
//     names the GPU
#define FUSEDLOSS_TUNE
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "../csrc/cuda/rows.cu"
#include "../csrc/math/losses.h"

namespace fusedloss::cuda {
namespace {

[[noreturn]] void stop(const std::string& why) {
  fflush(stdout);
  fprintf(stderr, "tune: %s\n", why.c_str());
  exit(1);
}
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) stop(std::string(what) + ": " + cudaGetErrorString(error));
}
#define CHECKED(CALL) check(CALL, #CALL)

template <class D>
const char* name_of() {
  return sizeof(D) == 8                     ? "fp64"
         : sizeof(D) == 4                   ? "fp32"
         : std::is_same_v<D, __nv_bfloat16> ? "bf16"
                                            : "fp16";
}
template <class D>
constexpr DType kDType = std::is_same_v<D, double>          ? DType::kFloat64
                         : std::is_same_v<D, float>         ? DType::kFloat32
                         : std::is_same_v<D, __nv_bfloat16> ? DType::kBFloat16
                                                            : DType::kFloat16;

// ---- memory of the GPU --------------------------------------------------------------------------

// An allocation of its own, so that a sanitizer sees what goes beyond it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size) {
    void* memory = nullptr;
    CHECKED(cudaMalloc(&memory, bytes()));
    data = static_cast<T*>(memory);
    CHECKED(cudaMemsetAsync(data, 0, bytes()));
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;

  T* data;
  int64_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void set(std::initializer_list<T> content) {
    CHECKED(cudaMemcpy(data, content.begin(), bytes(), cudaMemcpyHostToDevice));
  }
  T first() const {
    T value;
    CHECKED(cudaMemcpy(&value, data, sizeof(T), cudaMemcpyDeviceToHost));
    return value;
  }

 private:
  int64_t size_;
};

// A number of [0, 1) that depends on i alone.
__device__ double scatter(int64_t i) {
  uint64_t x = (static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  return static_cast<double>((x ^ x >> 27) >> 11) * 0x1p-53;
}
// Numbers from `low` on, over a range of `range`.
template <class T>
__global__ void fill(T* data, int64_t size, double low, double range, int64_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    const double x = low + range * scatter(i + seed);
    if constexpr (std::is_integral_v<T>) {
      data[i] = static_cast<T>(x);
    } else {
      data[i] = narrow<T>(x);
    }
  }
}
// Counts the numbers of a that neither are b's nor their neighbours, nor within `relative` of b's
// or `absolute`.
template <class D>
__global__ void count_unequal(const D* a, const D* b, int64_t size, double relative,
                              double absolute, unsigned* count) {
  using Bits = std::conditional_t<sizeof(D) == 2, uint16_t,
                                  std::conditional_t<sizeof(D) == 4, uint32_t, uint64_t>>;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    const double x = widen(a[i]), y = widen(b[i]);
    const Bits bits_x = reinterpret_cast<const Bits*>(a)[i];
    const Bits bits_y = reinterpret_cast<const Bits*>(b)[i];
    const bool neighbours = bits_x - bits_y == 1 || bits_y - bits_x == 1;
    if (x == y || (isnan(x) && isnan(y)) || neighbours) continue;
    if (!(fabs(x - y) <= fmax(relative * fabs(y), absolute))) atomicAdd(count, 1u);
  }
}

constexpr int kHelperThreads = 256;

unsigned helper_blocks(int64_t size) {
  const int64_t most = int64_t{4} * device_attribute(cudaDevAttrMultiProcessorCount);
  return static_cast<unsigned>(std::min(most, ceil_div(size, kHelperThreads)));
}
template <class T>
void draw(const Buffer<T>& buffer, double low, double range) {
  static int64_t seed = 0;  // others each time
  seed += buffer.size();
  fill<T><<<helper_blocks(buffer.size()), kHelperThreads>>>(buffer.data, buffer.size(), low, range,
                                                            seed);
}
template <class D>
unsigned unequal(const Buffer<D>& a, const Buffer<D>& b, double relative, double absolute) {
  const Buffer<unsigned> count(1);
  count_unequal<D><<<helper_blocks(a.size()), kHelperThreads>>>(a.data, b.data, a.size(), relative,
                                                                absolute, count.data);
  return count.first();
}

// ---- a step of a loss ---------------------------------------------------------------------------

// What a launch needs, as csrc/torch/cuda.cpp sets it: a mean, whose upstream gradient is
// predicted.
struct Setting {
  Buffer<double> loss{1}, forward_state{2}, prediction{2};
  Buffer<float> grad_output{1};
  Buffer<char> workspace{static_cast<int64_t>(workspace_bytes())};
  Buffer<Fault> fault{1};

  Setting() {
    prediction.set({1, kMaxConfidence});
    grad_output.set({0.5f});
  }
  Launch forward() const {
    Launch l;
    l.pass = Pass::kForward;
    l.loss = loss.data;
    l.loss_dtype = DType::kFloat64;
    l.forward_state = forward_state.data;
    l.prediction = prediction.data;
    l.fault = fault.data;
    l.workspace = workspace.data;
    return l;
  }
  // With another upstream gradient than was predicted.
  Launch backward() const {
    Launch l = forward();
    l.pass = Pass::kBackward;
    l.loss = nullptr;
    l.grad_output = grad_output.data;
    return l;
  }
};

// Cross-entropy of (outer, classes, inner) logits, with class indices or, if soft, probabilities.
template <class D>
struct RowsStep {
  static constexpr double kNoSmoothing = 0;
  const int64_t count;  // of rows
  const Setting setting;
  const Buffer<D> input, gradient, probabilities;
  const Buffer<int64_t> indices;
  const fusedloss::RowsCall rows;

  RowsStep(int64_t outer, int64_t classes, int64_t inner, bool soft)
      : count(outer * inner),
        input(count * classes),
        gradient(count * classes),
        probabilities(soft ? count * classes : 1),
        indices(count),
        rows(call(outer, classes, inner, soft)) {
    draw(input, -4, 8);
    draw(probabilities, 0, 2.0 / static_cast<double>(classes));
    draw(indices, 0, static_cast<double>(classes));
  }
  RowsDevice<D> device() const { return {{}, rows}; }

  void run(const RowsPlan& plan, Launch l) const {
    l.normalizer = static_cast<double>(count);
    if (rows.indices && l.pass == Pass::kForward) {
      l.class_weights = {indices.data, count, rows.classes};
      l.class_weights.divide_into_slices();
    }
    CHECKED(with_loss<D>(rows, plan, [&]<class Loss>(std::type_identity<Loss>) {
      return run_rows<Loss>(rows, l, plan);
    }));
  }
  void forward(const RowsPlan& plan) const { run(plan, setting.forward()); }

 private:
  Call call(int64_t outer, int64_t classes, int64_t inner, bool soft) const {
    Call call;
    call.parameters = &kNoSmoothing;
    call.compute_in_double = sizeof(D) == 8;
    call.numel = input.size();
    call.space = {3, {outer, classes, inner}};
    const auto set = [&](auto& side, D* data) {
      side.data = data;
      side.dtype = kDType<D>;
      const int64_t strides[] = {classes * inner, inner, 1};
      std::copy_n(strides, 3, side.strides);
    };
    set(call.inputs[0], input.data);
    set(call.gradients[0], gradient.data);
    set(call.inputs[1], probabilities.data);
    if (!soft) {
      call.inputs[1].data = indices.data;
      call.inputs[1].dtype = DType::kInt64;
    }
    return call;
  }
};

// The results of one kernel, to hold those of others against.
template <class D>
class Truth {
 public:
  // run() leaves its results in the setting's loss and in `output`, whose rest stays nan.
  template <class Run>
  Truth(Run&& run, const Setting& setting, const Buffer<D>& output)
      : setting_(setting), output_(output), expected_(output.size()) {
    spoil();
    run();
    loss_ = setting.loss.first();
    CHECKED(cudaMemcpy(expected_.data, output.data, output.bytes(), cudaMemcpyDeviceToDevice));
  }
  // What is wrong with another run; "" if nothing is.
  template <class Run>
  std::string problem(Run&& run, double relative, double absolute) const {
    spoil();
    run();
    std::string found;
    const double loss = setting_.loss.first();
    if (!(std::fabs(loss - loss_) <= relative * std::fabs(loss_))) {
      found += " the loss is " + std::to_string(loss) + " and not " + std::to_string(loss_);
    }
    if (const unsigned count = unequal(output_, expected_, relative, absolute)) {
      found += " " + std::to_string(count) + " elements are wrong";
    }
    if (setting_.fault.first().state != Fault::kNone) found += " it reports an error";
    return found;
  }

 private:
  void spoil() const { CHECKED(cudaMemsetAsync(output_.data, 0xff, output_.bytes())); }

  const Setting& setting_;
  const Buffer<D>& output_;
  Buffer<D> expected_;
  double loss_ = 0;
};

// Prints what is wrong, if anything is.
bool is_right(const std::string& what, const std::string& problem) {
  if (!problem.empty()) printf("WRONG: %s:%s\n", what.c_str(), problem.c_str());
  return problem.empty();
}

// ---- plans of rows_held -------------------------------------------------------------------------

struct Variant {
  HeldKnobs knobs;
  RowsPlan plan;
  std::vector<float> times;

  float median() const {
    std::vector<float> sorted = times;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
  std::string name() const {
    std::ostringstream out;
    out << "{" << knobs.classes << ", " << knobs.threads << ", " << knobs.threads_per_sm << ", "
        << knobs.stages << "}";
    return out.str();
  }
};

// All that differ, the default first; none if rows_held does not take the call.
template <class D>
std::vector<Variant> variants_of(const RowsStep<D>& step) {
  std::vector<Variant> found;
  const auto add = [&](const HeldKnobs& knobs) {
    const auto plan = plan_held(step.rows, step.device(), knobs);
    const auto same = [&](const Variant& other) { return other.plan == *plan; };
    if (plan && std::none_of(found.begin(), found.end(), same)) found.push_back({knobs, *plan, {}});
  };
  add(default_knobs(step.rows.classes));
  if (found.empty()) return found;
  for (const int classes : {kFewHeld, kManyHeld}) {
    for (const int threads : {kRowBlock, kRowBlock / 2, kRowBlock / 4}) {
      for (const int quarters : {4, 3, 2}) {
        for (int stages = kMaxHeldStages; stages > 0; --stages) {
          add({classes, threads, held_threads_per_sm(classes) * quarters / 4, stages});
        }
      }
    }
  }
  return found;
}

// An event at each end of what is timed.
struct Span {
  cudaEvent_t start, end;

  Span() {
    CHECKED(cudaEventCreate(&start));
    CHECKED(cudaEventCreate(&end));
  }
  ~Span() {
    cudaEventDestroy(start);
    cudaEventDestroy(end);
  }
  Span(const Span&) = delete;

  float time() const {
    float milliseconds = 0;
    CHECKED(cudaEventElapsedTime(&milliseconds, start, end));
    return milliseconds;
  }
};

// Adds a time to each variant, and one of a copy of as many bytes, all of which begin with a cache
// that has nothing of theirs; the one that is first changes from round to round.
template <class D>
void time_once(const RowsStep<D>& step, std::vector<Variant>& variants, std::vector<float>& copies,
               const Buffer<char>& flush, const Buffer<D>& other, int round) {
  const size_t count = variants.size() + 1;
  std::vector<Span> spans(count);
  for (size_t i = 0; i < count; ++i) {
    const size_t which = (i + round) % count;
    CHECKED(cudaMemsetAsync(flush.data, round, flush.bytes()));
    CHECKED(cudaEventRecord(spans[which].start));
    if (which < variants.size()) {
      step.forward(variants[which].plan);
    } else {
      CHECKED(
          cudaMemcpyAsync(other.data, step.gradient.data, other.bytes(), cudaMemcpyDeviceToDevice));
    }
    CHECKED(cudaEventRecord(spans[which].end));
  }
  CHECKED(cudaDeviceSynchronize());
  for (size_t i = 0; i < variants.size(); ++i) variants[i].times.push_back(spans[i].time());
  copies.push_back(spans.back().time());
}

// Where times differ by less than 1 %, the default wins, and then whoever has fewer threads.
const Variant& best_of(const std::vector<Variant>& variants) {
  constexpr float kTie = 1.01f;
  float least = variants.front().median();
  for (const Variant& v : variants) least = std::min(least, v.median());
  const Variant* best = &variants.front();
  if (best->median() <= kTie * least) return *best;
  best = nullptr;
  for (const Variant& v : variants) {
    if (v.median() <= kTie * least && (!best || v.plan.threads < best->plan.threads)) best = &v;
  }
  return *best;
}

// The table of plans, a line each. What stands there of other GPUs and shapes stays.
class Table {
 public:
  explicit Table(const char* file) : file_(file) {
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) lines_.push_back(line);
  }
  // Null: the default is the best.
  void set(int element_bytes, int64_t classes, const Variant* best, const std::string& comment) {
    std::ostringstream gpu;
    gpu << "{" << capability() << ", " << device_attribute(cudaDevAttrMultiProcessorCount) << ", "
        << device_attribute(cudaDevAttrGlobalMemoryBusWidth) << ", " << element_bytes << ", "
        << std::bit_ceil(static_cast<uint64_t>(classes)) << ", ";
    std::erase_if(lines_, [&](const std::string& line) { return line.starts_with(gpu.str()); });
    if (best) lines_.push_back(gpu.str() + best->name() + "},  // " + comment);
    std::ofstream out(file_);
    for (const std::string& line : lines_) out << line << '\n';
    if (!out.flush()) stop("cannot write " + std::string(file_));
  }

 private:
  const char* file_;
  std::vector<std::string> lines_;
};

std::string gpu_name() {
  int device = 0;
  cudaDeviceProp properties;
  CHECKED(cudaGetDevice(&device));
  CHECKED(cudaGetDeviceProperties(&properties, device));
  return properties.name;
}

// Returns whether all plans are right.
template <class D>
bool tune(int64_t count, int64_t classes, int rounds, Table& table) {
  const RowsStep<D> step(count, classes, 1, false);
  std::vector<Variant> variants = variants_of(step);
  const std::string shape =
      std::string(name_of<D>()) + " " + std::to_string(count) + "x" + std::to_string(classes);
  if (variants.empty()) {
    printf("%s: rows_held does not take it on this GPU\n", shape.c_str());
    return true;
  }
  const auto run = [&](const Variant& v) { return [&] { step.forward(v.plan); }; };
  bool right = true;
  {
    const Truth<D> truth(run(variants.front()), step.setting, step.gradient);
    std::erase_if(variants, [&](const Variant& v) {
      const bool agrees = is_right(shape + " " + v.name(), truth.problem(run(v), 1e-6, 0));
      right = right && agrees;
      return !agrees;
    });
  }
  if (variants.empty()) return false;
  const Buffer<char> flush(int64_t{2} * device_attribute(cudaDevAttrL2CacheSize));
  const Buffer<D> other(step.gradient.size());
  std::vector<float> copies;
  for (int round = 0; round < rounds; ++round) {
    time_once(step, variants, copies, flush, other, round);
  }
  const float copy = Variant{{}, {}, copies}.median(), by_default = variants.front().median();
  const Variant& best = best_of(variants);
  for (const Variant& v : variants) {
    printf("%s %-18s %9.4f ms, %5.3f of the default, %5.3f of a copy%s\n", shape.c_str(),
           v.name().c_str(), v.median(), v.median() / by_default, v.median() / copy,
           &v == &best ? "  <-" : "");
  }
  fflush(stdout);
  char comment[200];
  snprintf(comment, sizeof comment, "%s, %s: %.3f of the default's time", gpu_name().c_str(),
           shape.c_str(), best.median() / by_default);
  table.set(sizeof(D), classes, &best == &variants.front() ? nullptr : &best, comment);
  return right;
}

// ---- checks -------------------------------------------------------------------------------------

// How far the results of two kernels may lie apart.
template <class D>
constexpr double kTolerance = sizeof(D) == 8 ? 1e-12 : 1e-5;

// Every kernel over rows, beside the one that walks a row at a time.
template <class D>
bool check_rows(int64_t outer, int64_t classes, int64_t inner, bool soft) {
  const RowsStep<D> step(outer, classes, inner, soft);
  const auto device = step.device();
  std::vector<RowsPlan> plans = {plan_rows(step.rows, device), plan_strided(step.rows, device)};
  if (inner == 1) plans.push_back(plan_contiguous(step.rows, device, 1));
  for (const Variant& v : variants_of(step)) {
    // One of those that differ in nothing but how many blocks there are.
    if (v.knobs.threads_per_sm == held_threads_per_sm(v.plan.held)) plans.push_back(v.plan);
  }
  RowsPlan simple;
  simple.kernel = RowsPlan::Kernel::kStrided;
  simple.threads = kStridedBlock;
  const double absolute = kTolerance<D> / static_cast<double>(outer * inner);
  bool right = true;
  for (const Launch& launch : {step.setting.forward(), step.setting.backward()}) {
    const auto run = [&](const RowsPlan& plan) { return [&] { step.run(plan, launch); }; };
    const Truth<D> truth(run(simple), step.setting, step.gradient);
    for (const RowsPlan& plan : plans) {
      std::ostringstream what;
      what << name_of<D>() << " " << outer << "x" << classes << "x" << inner
           << (soft ? " probabilities" : "") << ", kernel " << static_cast<int>(plan.kernel)
           << ", clusters of " << plan.cluster << " blocks of " << plan.threads << " threads, "
           << plan.held << " classes held";
      right &= is_right(what.str(), truth.problem(run(plan), kTolerance<D>, absolute));
    }
  }
  return right;
}

struct Pointwise {
  const char* name;
  bool indexed;
  int inputs, gradients;
};
#define FUSEDLOSS_NAME(TEXT, LOSS) {TEXT, LOSS::kIndexed, LOSS::kInputs, LOSS::kGradients},
constexpr Pointwise kPointwise[] = {FUSEDLOSS_POINTWISE_LOSSES(FUSEDLOSS_NAME)};
#undef FUSEDLOSS_NAME

// What a pointwise kernel is asked for.
enum class Ask { kStep, kWeightedStep, kValues, kGradientsOfValues };

// The kernel for vectors of a loss, beside the one for any strides. shift: elements in front.
template <class D>
bool check_pointwise(int number, int64_t rows, int64_t columns, int shift) {
  const Pointwise& loss = kPointwise[number];
  const Setting setting;
  const Buffer<D> input(rows * columns + shift), target(input.size()), factor(input.size()),
      output(input.size()), others(input.size());
  const Buffer<int64_t> indices(rows);
  for (const Buffer<D>* numbers : {&input, &target, &factor}) draw(*numbers, 0.01, 0.98);
  draw(indices, 0, static_cast<double>(columns));
  bool right = true;
  for (const Ask ask : {Ask::kStep, Ask::kWeightedStep, Ask::kValues, Ask::kGradientsOfValues}) {
    const auto run = [&](bool contiguous) {
      return [&, contiguous] {
        const double parameters[] = {0.1, 1};  // a width or the least number, and an option
        Call call;
        call.parameters = parameters;
        call.compute_in_double = sizeof(D) == 8;
        call.numel = rows * columns;
        call.space = {2, {rows, columns}};
        const auto set = [&](Operand& operand, const Buffer<D>& numbers) {
          operand.data = numbers.data + shift;
          operand.dtype = kDType<D>;
          operand.contiguous = contiguous;
          operand.strides[0] = columns;
          operand.strides[1] = 1;
        };
        set(call.inputs[0], input);
        set(call.inputs[1], target);
        if (loss.indexed) {
          Operand& classes = call.inputs[1];
          classes.data = indices.data;
          classes.dtype = DType::kInt64;
          classes.class_dim = 1;
          classes.contiguous = false;
          classes.strides[0] = 1;
          classes.strides[1] = 0;
        }
        if (loss.inputs > 2) set(call.inputs[2], factor);
        Launch l = setting.forward();
        l.normalizer = static_cast<double>(call.numel);
        const auto out = [&](const Buffer<D>& to) {
          return Output{to.data + shift, kDType<D>, {}};
        };
        (ask == Ask::kValues ? call.value : call.gradients[0]) = out(output);
        if (loss.gradients > 1 && ask != Ask::kValues) call.gradients[1] = out(others);
        if (ask == Ask::kWeightedStep) set(call.weight, factor);
        if (ask == Ask::kGradientsOfValues) set(call.upstream, factor);
        if (ask == Ask::kValues || ask == Ask::kGradientsOfValues) {
          l.pass = ask == Ask::kValues ? Pass::kValue : Pass::kBackward;
          l.loss = nullptr;
          l.prediction = nullptr;
          l.normalizer = 1;
        }
        CHECKED(kernels[number](call, l));
      };
    };
    const Truth<D> truth(run(false), setting, output);
    const double absolute = ask == Ask::kStep || ask == Ask::kWeightedStep
                                ? kTolerance<D> / static_cast<double>(rows * columns)
                                : kTolerance<D>;
    const std::string what = std::string(name_of<D>()) + " " + loss.name + " " +
                             std::to_string(rows) + "x" + std::to_string(columns) + " as " +
                             std::to_string(static_cast<int>(ask));
    right &= is_right(what, truth.problem(run(true), kTolerance<D>, absolute));
  }
  return right;
}

template <class D>
bool check_all() {
  bool right = true;
  // Rows of a few threads, of a block and of a cluster, in whole vectors and with a tail; and rows
  // that lie side by side.
  for (const auto& [outer, classes, inner] :
       std::initializer_list<std::array<int64_t, 3>>{{600, 10, 1},
                                                     {33, 64, 1},
                                                     {9, 257, 1},
                                                     {9, 264, 1},
                                                     {5, 1000, 1},
                                                     {3, 4099, 1},
                                                     {3, 5000, 1},
                                                     {2, 70'000, 1},
                                                     {2, 70'001, 1},
                                                     {2, 5, 7},
                                                     {3, 21, 704},
                                                     {3, 100, 64}}) {
    right &= check_rows<D>(outer, classes, inner, false);
    right &= check_rows<D>(outer, classes, inner, true);
  }
  for (int loss = 0; loss < static_cast<int>(std::size(kPointwise)); ++loss) {
    for (const auto& [rows, columns] :
         std::initializer_list<std::array<int64_t, 2>>{{1, 9}, {33, 131}, {130, 140}}) {
      for (const int shift : {0, 1}) right &= check_pointwise<D>(loss, rows, columns, shift);
    }
  }
  return right;
}

// ---- the program --------------------------------------------------------------------------------

struct Shape {
  const char* dtype;
  int64_t rows, classes;
};
// Those of the bench, and some between.
constexpr Shape kShapes[] = {
    {"bf16", 524'288, 64},    {"bf16", 131'072, 256},  {"bf16", 131'072, 512},
    {"bf16", 65'536, 1024},   {"bf16", 65'536, 2048},  {"bf16", 32'768, 4096},
    {"bf16", 16'384, 32'000}, {"bf16", 8192, 128'256}, {"fp32", 131'072, 256},
    {"fp32", 65'536, 1024},   {"fp32", 32'768, 4096},  {"fp32", 16'384, 32'000},
    {"fp32", 8192, 128'256}};

bool tune(const Shape& shape, int rounds, Table& table) {
  if (strcmp(shape.dtype, "bf16") == 0) {
    return tune<__nv_bfloat16>(shape.rows, shape.classes, rounds, table);
  }
  if (strcmp(shape.dtype, "fp32") == 0) {
    return tune<float>(shape.rows, shape.classes, rounds, table);
  }
  stop("a dtype is bf16 or fp32, not " + std::string(shape.dtype));
}

int run(int count, char** arguments) {
  const std::string first = count > 1 ? arguments[1] : "";
  if (first == "--device") {
    CHECKED(cudaFree(nullptr));
    printf("%s\n", gpu_name().c_str());
    return 0;
  }
  if (first == "--check") {
    const bool right[] = {check_all<double>(), check_all<float>(), check_all<__nv_bfloat16>(),
                          check_all<__half>()};
    if (std::count(std::begin(right), std::end(right), false)) return 1;
    printf("all kernels agree\n");
    return 0;
  }
  if (first.empty() || first.starts_with("-") || (count > 3 && count % 3 != 0)) {
    stop("usage: tune FILE [ROUNDS [DTYPE ROWS CLASSES]...], tune --check or tune --device");
  }
  const int rounds = count > 2 ? atoi(arguments[2]) : 15;
  if (rounds < 1) stop("ROUNDS is a positive number, not " + std::string(arguments[2]));
  Table table(arguments[1]);
  bool right = true;
  if (count > 3) {
    for (char** at = arguments + 3; at < arguments + count; at += 3) {
      right &= tune({at[0], atoll(at[1]), atoll(at[2])}, rounds, table);
    }
  } else {
    for (const Shape& shape : kShapes) right &= tune(shape, rounds, table);
  }
  return right ? 0 : 1;
}

}  // namespace
}  // namespace fusedloss::cuda

int main(int count, char** arguments) { return fusedloss::cuda::run(count, arguments); }
