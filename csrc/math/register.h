// CPU SIMD registers without torch, for losses that are compiled on the machine they run on: what
// vocabulary.h and the engine ask of at::vec::Vectorized, over the compiler's own vector types.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace fusedloss::simd {

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kBytes = 64;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// The compiler's type, and signed integers as wide, which is what it gives for a comparison.
template <class T>
struct Vector;
#define FUSEDLOSS_VECTOR(T, INTEGER)                           \
  template <>                                                  \
  struct Vector<T> {                                           \
    typedef T Native __attribute__((vector_size(kBytes)));     \
    typedef INTEGER Bits __attribute__((vector_size(kBytes))); \
  };
FUSEDLOSS_VECTOR(float, int32_t)
FUSEDLOSS_VECTOR(double, int64_t)
FUSEDLOSS_VECTOR(int32_t, int32_t)
#undef FUSEDLOSS_VECTOR

template <class T>
class Vectorized {
 public:
  using Native = typename Vector<T>::Native;
  using Bits = typename Vector<T>::Bits;

  static constexpr int size() { return kBytes / sizeof(T); }

  Vectorized() = default;
  FUSEDLOSS_HD Vectorized(T x) : v_(x - Native{}) {}  // keeps the sign of zero, as + would not
  FUSEDLOSS_HD Vectorized(Native v) : v_(v) {}
  FUSEDLOSS_HD operator Native() const { return v_; }
  FUSEDLOSS_HD Bits bits() const { return (Bits)v_; }
  FUSEDLOSS_HD static Vectorized from_bits(Bits bits) { return (Native)bits; }

  FUSEDLOSS_HD static Vectorized loadu(const void* p) {
    Vectorized r;
    std::memcpy(&r.v_, p, kBytes);
    return r;
  }
  FUSEDLOSS_HD static Vectorized loadu(const void* p, int64_t count) {
    T lanes[size()] = {};
    std::memcpy(lanes, p, count * sizeof(T));
    return loadu(lanes);
  }
  FUSEDLOSS_HD void store(void* p) const { std::memcpy(p, &v_, kBytes); }
  FUSEDLOSS_HD void store(void* p, int count) const { std::memcpy(p, &v_, count * sizeof(T)); }
  // The first count lanes of b, the others of a.
  FUSEDLOSS_HD static Vectorized set(Vectorized a, Vectorized b, int64_t count) {
    std::memcpy(&a.v_, &b.v_, count * sizeof(T));
    return a;
  }
  FUSEDLOSS_HD static Vectorized blendv(Vectorized no, Vectorized yes, Vectorized mask) {
    return mask.bits() ? yes.v_ : no.v_;
  }

  // Lane by lane: for what is seldom wanted.
  template <class F, class... Others>
  FUSEDLOSS_HD Vectorized map(F&& f, const Others&... others) const {
    Vectorized r;
    for (int i = 0; i < size(); ++i) r.v_[i] = f(v_[i], others.v_[i]...);
    return r;
  }
  // A bit for each lane that is 0.
  FUSEDLOSS_HD int zero_mask() const {
    int mask = 0;
    for (int i = 0; i < size(); ++i) mask |= (bits()[i] == 0) << i;
    return mask;
  }
  // Of a mask: whether it holds anywhere.
  FUSEDLOSS_HD bool any() const {
    bool found = false;
    for (int i = 0; i < size(); ++i) found |= bits()[i] != 0;
    return found;
  }
  FUSEDLOSS_HD Vectorized abs() const { return from_bits(bits() & ~Vectorized(T(-0.0)).bits()); }
  FUSEDLOSS_HD Vectorized exp() const {
    return map([](T x) { return std::exp(x); });
  }
  FUSEDLOSS_HD Vectorized log() const {
    return map([](T x) { return std::log(x); });
  }
  FUSEDLOSS_HD Vectorized log1p() const {
    return map([](T x) { return std::log1p(x); });
  }

  FUSEDLOSS_HD friend Vectorized operator-(Vectorized a) { return -a.v_; }
  FUSEDLOSS_HD friend Vectorized operator+(Vectorized a, Vectorized b) { return a.v_ + b.v_; }
  FUSEDLOSS_HD friend Vectorized operator-(Vectorized a, Vectorized b) { return a.v_ - b.v_; }
  FUSEDLOSS_HD friend Vectorized operator*(Vectorized a, Vectorized b) { return a.v_ * b.v_; }
  FUSEDLOSS_HD friend Vectorized operator/(Vectorized a, Vectorized b) { return a.v_ / b.v_; }
  FUSEDLOSS_HD friend Vectorized operator<<(Vectorized a, Vectorized b) { return a.v_ << b.v_; }
  FUSEDLOSS_HD friend Vectorized operator>>(Vectorized a, Vectorized b) { return a.v_ >> b.v_; }
  // Masks: all bits of a lane, or none.
  FUSEDLOSS_HD friend Vectorized operator&(Vectorized a, Vectorized b) {
    return from_bits(a.bits() & b.bits());
  }
  FUSEDLOSS_HD friend Vectorized operator|(Vectorized a, Vectorized b) {
    return from_bits(a.bits() | b.bits());
  }
  FUSEDLOSS_HD friend Vectorized operator~(Vectorized a) { return from_bits(~a.bits()); }
  FUSEDLOSS_HD friend Vectorized operator<(Vectorized a, Vectorized b) {
    return from_bits(a.v_ < b.v_);
  }
  FUSEDLOSS_HD friend Vectorized operator<=(Vectorized a, Vectorized b) {
    return from_bits(a.v_ <= b.v_);
  }
  FUSEDLOSS_HD friend Vectorized operator>(Vectorized a, Vectorized b) {
    return from_bits(a.v_ > b.v_);
  }
  FUSEDLOSS_HD friend Vectorized operator>=(Vectorized a, Vectorized b) {
    return from_bits(a.v_ >= b.v_);
  }
  FUSEDLOSS_HD friend Vectorized operator==(Vectorized a, Vectorized b) {
    return from_bits(a.v_ == b.v_);
  }
  FUSEDLOSS_HD friend Vectorized operator!=(Vectorized a, Vectorized b) {
    return from_bits(a.v_ != b.v_);
  }

 private:
  Native v_;
};

// The same bits as another type.
template <class To, class From>
FUSEDLOSS_HD Vectorized<To> cast(Vectorized<From> x) {
  return (typename Vectorized<To>::Native)(typename Vectorized<From>::Native)x;
}
// The same numbers, towards zero where To is of integers.
template <class To, class From>
FUSEDLOSS_HD Vectorized<To> convert(Vectorized<From> x) {
  return __builtin_convertvector((typename Vectorized<From>::Native)x,
                                 typename Vectorized<To>::Native);
}
// x bounded; nan stays nan: these instructions give their second operand then.
#define FUSEDLOSS_BOUNDS(T, MAX, MIN)                                                              \
  FUSEDLOSS_HD Vectorized<T> clamp_min(Vectorized<T> x, Vectorized<T> low) { return MAX(low, x); } \
  FUSEDLOSS_HD Vectorized<T> clamp(Vectorized<T> x, Vectorized<T> low, Vectorized<T> high) {       \
    return MIN(high, clamp_min(x, low));                                                           \
  }
#if defined(CPU_CAPABILITY_AVX512)
FUSEDLOSS_BOUNDS(float, _mm512_max_ps, _mm512_min_ps)
FUSEDLOSS_BOUNDS(double, _mm512_max_pd, _mm512_min_pd)
#elif defined(CPU_CAPABILITY_AVX2)
FUSEDLOSS_BOUNDS(float, _mm256_max_ps, _mm256_min_ps)
FUSEDLOSS_BOUNDS(double, _mm256_max_pd, _mm256_min_pd)
#else
template <class T>
FUSEDLOSS_HD Vectorized<T> clamp_min(Vectorized<T> x, Vectorized<T> low) {
  return Vectorized<T>::blendv(x, low, x < low);
}
template <class T>
FUSEDLOSS_HD Vectorized<T> clamp(Vectorized<T> x, Vectorized<T> low, Vectorized<T> high) {
  return Vectorized<T>::blendv(clamp_min(x, low), high, x > high);
}
#endif
#undef FUSEDLOSS_BOUNDS

// a b + c, rounded once where the CPU has an instruction for it.
#if defined(CPU_CAPABILITY_AVX512)
FUSEDLOSS_HD Vectorized<float> fmadd(Vectorized<float> a, Vectorized<float> b,
                                     Vectorized<float> c) {
  return _mm512_fmadd_ps(a, b, c);
}
FUSEDLOSS_HD Vectorized<float> sqrt(Vectorized<float> x) { return _mm512_sqrt_ps(x); }
FUSEDLOSS_HD Vectorized<double> sqrt(Vectorized<double> x) { return _mm512_sqrt_pd(x); }
#elif defined(CPU_CAPABILITY_AVX2)
FUSEDLOSS_HD Vectorized<float> fmadd(Vectorized<float> a, Vectorized<float> b,
                                     Vectorized<float> c) {
  return _mm256_fmadd_ps(a, b, c);
}
FUSEDLOSS_HD Vectorized<float> sqrt(Vectorized<float> x) { return _mm256_sqrt_ps(x); }
FUSEDLOSS_HD Vectorized<double> sqrt(Vectorized<double> x) { return _mm256_sqrt_pd(x); }
#else
FUSEDLOSS_HD Vectorized<float> fmadd(Vectorized<float> a, Vectorized<float> b,
                                     Vectorized<float> c) {
  return a * b + c;
}
template <class T>
FUSEDLOSS_HD Vectorized<T> sqrt(Vectorized<T> x) {
  return x.map([](T lane) { return std::sqrt(lane); });
}
#endif

}  // namespace fusedloss::simd
