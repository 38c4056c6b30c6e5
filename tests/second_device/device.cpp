// The device `second`, which every machine has: memory of the CPU under another name, and the CPU's own operations.
//
// It keeps apart what a GPU keeps apart: an operation on tensors of two devices is an error, autograd runs on a thread of
// the device; the paths that torch and hessfn keep for the CPU are not taken. Every transfer is counted.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

namespace {

using at::Tensor;
using c10::IntArrayRef;
using std::optional;

constexpr auto kSecond = c10::DeviceType::PrivateUse1;
const c10::Device kHere(kSecond, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// What an operation takes to the CPU for lack of a kernel, which is here all of them, is no transfer of the user's.
std::atomic<int64_t> transfers{0};
thread_local bool by_fallback = false;

void count_transfer() {
  if (!by_fallback) ++transfers;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* data = c10::alloc_cpu(n);
    return {data, data, &c10::free_cpu, kHere};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t n) const override { default_copy_data(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(kSecond, &memory)

// One device with one stream, in which all is done as soon as it is asked for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, kHere); }
  c10::DeviceType type() const override { return kSecond; }
  c10::Device exchangeDevice(c10::Device) const override { return kHere; }
  c10::Device getDevice() const override { return kHere; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<at::CPUGeneratorImpl>(1);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    static auto one = getNewGenerator(index);
    return one;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    auto resized = memory.allocate(n);
    std::memcpy(resized.get(), storage.data(), std::min(n, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(resized));
    storage.unsafeGetStorageImpl()->set_nbytes(n);
  }
};
Hooks hooks;
const auto registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// A tensor of the CPU in the same memory.
Tensor on_cpu(const Tensor& x) {
  if (x.device().type() != kSecond) return x;
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(at::kCPU));
}

Tensor there(const Tensor& x) {
  if (!x.defined()) return x;
  auto y = at::empty_like(x, x.options().device(kHere));
  on_cpu(y).copy_(x);
  return y;
}

Tensor empty(IntArrayRef size, optional<c10::ScalarType> dtype, optional<c10::Layout>, optional<c10::Device>,
             optional<bool>, optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<c10::ScalarType> dtype, optional<c10::Layout>,
                     optional<c10::Device>, optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.device() != to.device()) count_transfer();
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& x) {
  count_transfer();
  return on_cpu(x).item();
}

Tensor& set_storage(Tensor& x, c10::Storage source) {
  auto n = static_cast<int64_t>(source.nbytes() / x.itemsize());
  return at::native::set_storage_meta__symint(x, std::move(source), 0, {n}, {1});
}

struct Fallback {
  bool before = std::exchange(by_fallback, true);
  ~Fallback() { by_fallback = before; }
};

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Fallback guard;
  at::native::cpu_fallback(op, stack);
}

// torch asks a new device for its own convolutions.
Tensor convolution(const Tensor& x, const Tensor& w, const optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef out_padding,
                   int64_t groups) {
  auto b = bias && bias->defined() ? optional<Tensor>(on_cpu(*bias)) : std::nullopt;
  return there(at::convolution(on_cpu(x), on_cpu(w), b, stride, padding, dilation, transposed, out_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& w,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef out_padding, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  const int64_t channels = grad.size(1);
  auto bias = wanted[2] ? at::OptionalIntArrayRef(IntArrayRef(channels)) : std::nullopt;
  auto [dx, dw, db] = at::convolution_backward(on_cpu(grad), on_cpu(x), on_cpu(w), bias, stride, padding, dilation,
                                               transposed, out_padding, groups, wanted);
  return {there(dx), there(dw), there(db)};
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_meta__symint);
  m.impl("resize_", at::native::resize_);
  // Views, which have no fallback.
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("view", at::native::view);
  m.impl("view.dtype", at::native::view_dtype);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("unfold", at::native::unfold);
}

// What the tests call: torch.ops.second_device.num_transfers().
TORCH_LIBRARY(second_device, m) {
  m.def("num_transfers", [] { return transfers.load(); });
}
