// SIMD registers of the CPU, over the compiler's own vector types: Vec<T> holds numbers, Mask<T>
// what a comparison of them gives. Everything else in csrc knows registers only through these two
// and a few functions beside them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fusedloss {
inline namespace CPU_CAPABILITY {

// FUSEDLOSS_INTRINSIC(NAME): x86's intrinsic of that name for a whole register.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVecBytes = 64;
#define FUSEDLOSS_INTRINSIC(NAME) _mm512_##NAME
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kVecBytes = 32;
#define FUSEDLOSS_INTRINSIC(NAME) _mm256_##NAME
#else
constexpr int kVecBytes = 16;
#define FUSEDLOSS_INTRINSIC(NAME) _mm_##NAME
#endif

template <class T>
class Vec;

// Signed integers as wide as T: the bits of a register, lane by lane.
template <class T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
struct Native {
  typedef T Type __attribute__((vector_size(kVecBytes)));
};

// Calls f(u) for every u below kCount. u is a compile-time constant, so an array that only f uses
// stays in registers.
template <int kCount, class F>
FUSEDLOSS_HD void unrolled(F&& f) {
  [&]<int... u>(std::integer_sequence<int, u...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, u>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// A truth value for each lane: one bit of a mask register with AVX-512, otherwise all bits of the
// lane or none.
template <class T>
class Mask {
 public:
#if defined(CPU_CAPABILITY_AVX512)
  using Lanes = std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8>;
#else
  using Lanes = typename Native<Integer<T>>::Type;
#endif

  Mask() = default;
  FUSEDLOSS_HD Mask(Lanes lanes) : lanes_(lanes) {}
  FUSEDLOSS_HD operator Lanes() const { return lanes_; }

  FUSEDLOSS_HD bool all() const {
#if defined(CPU_CAPABILITY_AVX512)
    return lanes_ == static_cast<Lanes>(-1);
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)lanes_) == 0xff;
    return _mm256_movemask_pd((__m256d)lanes_) == 0xf;
#elif defined(__x86_64__)
    return _mm_movemask_epi8((__m128i)lanes_) == 0xffff;
#else
    bool found = true;
    for (size_t i = 0; i < kVecBytes / sizeof(T); ++i) found &= lanes_[i] != 0;
    return found;
#endif
  }
  FUSEDLOSS_HD bool any() const { return !(~*this).all(); }

  FUSEDLOSS_HD friend Mask operator&(Mask a, Mask b) { return Lanes(a.lanes_ & b.lanes_); }
  FUSEDLOSS_HD friend Mask operator|(Mask a, Mask b) { return Lanes(a.lanes_ | b.lanes_); }
  FUSEDLOSS_HD friend Mask operator~(Mask a) { return Lanes(~a.lanes_); }

 private:
  Lanes lanes_;
};

template <class T>
class Vec {
 public:
  using Type = typename Native<T>::Type;
  using Bits = typename Native<Integer<T>>::Type;

  static constexpr int size() { return kVecBytes / sizeof(T); }

  Vec() = default;
  FUSEDLOSS_HD Vec(T x) : v_(x - Type{}) {}  // keeps the sign of zero, as + would not
  FUSEDLOSS_HD Vec(Type v) : v_(v) {}
  FUSEDLOSS_HD operator Type() const { return v_; }
  FUSEDLOSS_HD Bits bits() const { return (Bits)v_; }
  FUSEDLOSS_HD static Vec from_bits(Bits bits) { return (Type)bits; }

  FUSEDLOSS_HD static Vec loadu(const void* p) {
    Vec r;
    std::memcpy(&r.v_, p, kVecBytes);
    return r;
  }
  FUSEDLOSS_HD void store(void* p) const { std::memcpy(p, &v_, kVecBytes); }

  // The first `count` lanes; a load leaves the others 0.
#if defined(CPU_CAPABILITY_AVX512)
  FUSEDLOSS_HD static Vec loadu(const void* p, int64_t count) {
    if constexpr (sizeof(T) == 4) {
      return (Type)_mm512_maskz_loadu_epi32(first_lanes(count), p);
    } else {
      return (Type)_mm512_maskz_loadu_epi64(first_lanes(count), p);
    }
  }
  FUSEDLOSS_HD void store(void* p, int64_t count) const {
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_epi32(p, first_lanes(count), (__m512i)v_);
    } else {
      _mm512_mask_storeu_epi64(p, first_lanes(count), (__m512i)v_);
    }
  }
  FUSEDLOSS_HD static Mask<T> first_lanes(int64_t count) {
    return static_cast<typename Mask<T>::Lanes>((1u << count) - 1);
  }
#else
#if defined(CPU_CAPABILITY_AVX2)
  FUSEDLOSS_HD static Vec loadu(const void* p, int64_t count) {
    return (Type)_mm256_maskload_epi32(static_cast<const int*>(p),
                                       (__m256i)(Bits)first_lanes(count));
  }
  FUSEDLOSS_HD void store(void* p, int64_t count) const {
    _mm256_maskstore_epi32(static_cast<int*>(p), (__m256i)(Bits)first_lanes(count), (__m256i)v_);
  }
#else
  [[gnu::noinline]] static Vec loadu(const void* p, int64_t count) {
    T lanes[size()] = {};
    std::memcpy(lanes, p, count * sizeof(T));
    return loadu(lanes);
  }
  [[gnu::noinline]] void store(void* p, int64_t count) const {
    std::memcpy(p, &v_, count * sizeof(T));
  }
#endif
  FUSEDLOSS_HD static Mask<T> first_lanes(int64_t count) {
    return [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      return Bits{i...} < static_cast<Integer<T>>(count);
    }(std::make_integer_sequence<int, size()>());
  }
#endif

  // The first `count` lanes of b, the others of a.
  FUSEDLOSS_HD static Vec set(Vec a, Vec b, int64_t count) {
    return blend(first_lanes(count), b, a);
  }
  FUSEDLOSS_HD static Vec blend(Mask<T> mask, Vec yes, Vec no) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_mask_blend_ps(mask, no, yes);
    } else {
      static_assert(std::is_same_v<T, double>);
      return _mm512_mask_blend_pd(mask, no, yes);
    }
#elif defined(CPU_CAPABILITY_AVX2)
    if constexpr (std::is_same_v<T, float>) {
      return _mm256_blendv_ps(no, yes, (__m256)(Bits)mask);
    } else {
      static_assert(std::is_same_v<T, double>);
      return _mm256_blendv_pd(no, yes, (__m256d)(Bits)mask);
    }
#elif defined(__x86_64__)
    // Intrinsics: GCC 12 fails to compile the same expression in operators.
    const __m128i m = (__m128i)(Bits)mask;
    return (Type)_mm_or_si128(_mm_and_si128(m, (__m128i)yes.v_),
                              _mm_andnot_si128(m, (__m128i)no.v_));
#else
    return (Bits)mask ? yes.v_ : no.v_;
#endif
  }

  // Calls f for each lane: slow, for rare cases.
  template <class F, class... Others>
  FUSEDLOSS_HD Vec map(F&& f, const Others&... others) const {
    Vec r;
    for (int i = 0; i < size(); ++i) r.v_[i] = f(v_[i], others.v_[i]...);
    return r;
  }

  FUSEDLOSS_HD friend Vec operator-(Vec a) { return -a.v_; }
  FUSEDLOSS_HD friend Vec operator+(Vec a, Vec b) { return a.v_ + b.v_; }
  FUSEDLOSS_HD friend Vec operator-(Vec a, Vec b) { return a.v_ - b.v_; }
  FUSEDLOSS_HD friend Vec operator*(Vec a, Vec b) { return a.v_ * b.v_; }
  FUSEDLOSS_HD friend Vec operator/(Vec a, Vec b) { return a.v_ / b.v_; }
  FUSEDLOSS_HD friend Vec operator<<(Vec a, Vec b) { return a.v_ << b.v_; }
  FUSEDLOSS_HD friend Vec operator>>(Vec a, Vec b) { return a.v_ >> b.v_; }
  FUSEDLOSS_HD friend Vec operator&(Vec a, Vec b) { return from_bits(a.bits() & b.bits()); }
  FUSEDLOSS_HD friend Vec operator|(Vec a, Vec b) { return from_bits(a.bits() | b.bits()); }

#if defined(CPU_CAPABILITY_AVX512)
#define FUSEDLOSS_COMPARE(OPERATOR, FLOATS, INTEGERS)                       \
  FUSEDLOSS_HD friend Mask<T> operator OPERATOR(Vec a, Vec b) {             \
    if constexpr (std::is_same_v<T, float>) {                               \
      return _mm512_cmp_ps_mask(a.v_, b.v_, FLOATS);                        \
    } else if constexpr (std::is_same_v<T, double>) {                       \
      return _mm512_cmp_pd_mask(a.v_, b.v_, FLOATS);                        \
    } else if constexpr (sizeof(T) == 4) {                                  \
      return _mm512_cmp_epi32_mask((__m512i)a.v_, (__m512i)b.v_, INTEGERS); \
    } else {                                                                \
      return _mm512_cmp_epi64_mask((__m512i)a.v_, (__m512i)b.v_, INTEGERS); \
    }                                                                       \
  }
#else
#define FUSEDLOSS_COMPARE(OPERATOR, FLOATS, INTEGERS) \
  FUSEDLOSS_HD friend Mask<T> operator OPERATOR(Vec a, Vec b) { return (Bits)(a.v_ OPERATOR b.v_); }
#endif
  FUSEDLOSS_COMPARE(<, _CMP_LT_OQ, _MM_CMPINT_LT)
  FUSEDLOSS_COMPARE(<=, _CMP_LE_OQ, _MM_CMPINT_LE)
  FUSEDLOSS_COMPARE(>, _CMP_GT_OQ, _MM_CMPINT_NLE)
  FUSEDLOSS_COMPARE(>=, _CMP_GE_OQ, _MM_CMPINT_NLT)
  FUSEDLOSS_COMPARE(==, _CMP_EQ_OQ, _MM_CMPINT_EQ)
  FUSEDLOSS_COMPARE(!=, _CMP_NEQ_UQ, _MM_CMPINT_NE)
#undef FUSEDLOSS_COMPARE

 private:
  Type v_;
};

// The same bits as a register of another type; for masks, the same lanes.
template <class To, class From>
FUSEDLOSS_HD Vec<To> cast(Vec<From> x) {
  return (typename Vec<To>::Type)(typename Vec<From>::Type)x;
}
template <class To, class From>
FUSEDLOSS_HD Mask<To> cast(Mask<From> mask) {
  static_assert(sizeof(To) == sizeof(From));
  return typename Mask<To>::Lanes(mask);
}
// The same numbers in another type; rounded towards zero if To is an integer type.
template <class To, class From>
FUSEDLOSS_HD Vec<To> convert(Vec<From> x) {
  return __builtin_convertvector((typename Vec<From>::Type)x, typename Vec<To>::Type);
}

template <class T>
FUSEDLOSS_HD Vec<T> select(Mask<T> condition, Vec<T> yes, Vec<T> no) {
  return Vec<T>::blend(condition, yes, no);
}

// max(a, b), min(a, b): b where either is nan. multiply_add(a, b, c): a b + c, rounded once where
// the CPU has an instruction for it.
#if defined(__x86_64__)
#if defined(__FMA__)
#define FUSEDLOSS_FMADD(a, b, c, SUFFIX) FUSEDLOSS_INTRINSIC(fmadd_##SUFFIX)(a, b, c)
#else
#define FUSEDLOSS_FMADD(a, b, c, SUFFIX) (a * b + c)
#endif
#define FUSEDLOSS_FUNCTIONS(T, SUFFIX)                                                            \
  FUSEDLOSS_HD Vec<T> max(Vec<T> a, Vec<T> b) { return FUSEDLOSS_INTRINSIC(max_##SUFFIX)(a, b); } \
  FUSEDLOSS_HD Vec<T> min(Vec<T> a, Vec<T> b) { return FUSEDLOSS_INTRINSIC(min_##SUFFIX)(a, b); } \
  FUSEDLOSS_HD Vec<T> sqrt(Vec<T> x) { return FUSEDLOSS_INTRINSIC(sqrt_##SUFFIX)(x); }            \
  FUSEDLOSS_HD Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {                                \
    return FUSEDLOSS_FMADD(a, b, c, SUFFIX);                                                      \
  }
FUSEDLOSS_FUNCTIONS(float, ps)
FUSEDLOSS_FUNCTIONS(double, pd)
#undef FUSEDLOSS_FUNCTIONS
#undef FUSEDLOSS_FMADD
#else
template <class T>
FUSEDLOSS_HD Vec<T> max(Vec<T> a, Vec<T> b) {
  return select(a > b, a, b);
}
template <class T>
FUSEDLOSS_HD Vec<T> min(Vec<T> a, Vec<T> b) {
  return select(a < b, a, b);
}
template <class T>
FUSEDLOSS_HD Vec<T> sqrt(Vec<T> x) {
  return x.map([](T lane) { return std::sqrt(lane); });
}
template <class T>
FUSEDLOSS_HD Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__ARM_NEON)
  if constexpr (std::is_same_v<T, float>) {
    return (typename Vec<T>::Type)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  } else {
    return (typename Vec<T>::Type)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  }
#else
  return a * b + c;
#endif
}
#endif

}  // namespace CPU_CAPABILITY
}  // namespace fusedloss
