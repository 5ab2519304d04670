// What Python gives the operators: checked, as the kernels take it.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels.h"

namespace fxprune {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Text = c10::string_view;

inline Layout layout_of(Text name) {
  TORCH_CHECK(name == "packed" || name == "channels-last", "unknown layout '", name, "'; known: channels-last, packed");
  return name == "packed" ? Layout::packed : Layout::channels_last;
}

// A contiguous uint8 tensor in a layout, and the sizes of its positions.
struct Levels {
  Tensor tensor;
  Activations activations;
  std::vector<int64_t> positions;

  Levels(const Tensor& input, Layout layout) : tensor(input.contiguous()) {
    TORCH_CHECK(input.scalar_type() == at::kByte, "expected uint8 levels, got ", input.scalar_type());
    const bool is_packed = layout == Layout::packed;
    TORCH_CHECK(input.dim() >= (is_packed ? 2 : 1), "levels of ", input.dim(), " dimensions have no channels");
    TORCH_CHECK(!is_packed || input.size(-1) == 4, "a packed tensor has 4 channels last, not ", input.size(-1));
    const auto sizes = input.sizes();
    positions.assign(sizes.begin() + (is_packed ? 1 : 0), sizes.end() - 1);
    const int64_t channels = is_packed ? 4 * sizes[0] : sizes.back();
    activations = {tensor.const_data_ptr<uint8_t>(), count(), channels, layout};
  }

  void check_has(int64_t channels) const {
    TORCH_CHECK_VALUE(0 <= channels && channels <= activations.channels, "there are ", activations.channels,
                      " channels, not ", channels);
  }

 private:
  int64_t count() const {
    int64_t product = 1;
    for (const int64_t size : positions) product *= size;
    return product;
  }
};

inline std::vector<int64_t> shape_of(const std::vector<int64_t>& positions, int64_t channels, Layout layout) {
  std::vector<int64_t> shape = positions;
  if (layout == Layout::packed) {
    shape.insert(shape.begin(), (channels + 3) / 4);
    channels = 4;
  }
  shape.push_back(channels);
  return shape;
}

template <typename T>
const T* numbers(const Tensor& tensor, int64_t count, const char* name) {
  TORCH_CHECK(tensor.device().is_cpu(), "'", name, "' is on ", tensor.device(),
              ", the input on the CPU; move both to one device with .to(device)");
  TORCH_CHECK(tensor.scalar_type() == c10::CppTypeToScalarType<T>::value, "'", name, "' must be ",
              c10::CppTypeToScalarType<T>::value, ", not ", tensor.scalar_type());
  TORCH_CHECK(tensor.numel() == count && tensor.is_contiguous(), "'", name, "' must hold ", count,
              " numbers side by side, got ", tensor.sizes());
  return tensor.const_data_ptr<T>();
}

// Bounds of levels are levels, whatever is given.
inline Requantization requantization_of(const Tensor& offsets, const Tensor& multiplier, const Tensor& addend,
                                        const Optional& table, double low, double high, at::ScalarType dtype,
                                        int64_t channels) {
  const auto bound = [&](double value) {
    return static_cast<float>(dtype == at::kByte ? std::min(std::max(0.0, value), 255.0) : value);
  };
  return {numbers<int32_t>(offsets, channels, "offsets"),
          numbers<float>(multiplier, channels, "multiplier"),
          numbers<float>(addend, channels, "addend"),
          table ? numbers<uint8_t>(*table, 256, "table") : nullptr,
          bound(low),
          bound(high)};
}

inline Output output_of(Tensor& output, int64_t channels, Layout layout) {
  if (output.scalar_type() == at::kByte) return {output.mutable_data_ptr<uint8_t>(), nullptr, channels, layout};
  TORCH_CHECK(output.scalar_type() == at::kFloat, "outputs are uint8 or float32, not ", output.scalar_type());
  TORCH_CHECK(layout == Layout::channels_last, "float32 is given channels-last only");
  return {nullptr, output.mutable_data_ptr<float>(), channels, layout};
}

// A damaged matrix must not be computed with: its columns and pointers are addresses.
inline void check(const Matrix& matrix, int64_t columns, int64_t pointers, int64_t rows, int64_t groups) {
  TORCH_CHECK(columns == matrix.blocks, "there are ", matrix.blocks, " blocks and ", columns, " columns");
  TORCH_CHECK(pointers == rows + 1, "there are ", rows, " rows of blocks and ", pointers, " row pointers");
  bool is_ascending = matrix.row_pointers[0] == 0 && matrix.row_pointers[rows] == matrix.blocks;
  for (int64_t row = 0; row < rows; ++row) is_ascending &= matrix.row_pointers[row] <= matrix.row_pointers[row + 1];
  uint16_t most = 0;  // Of negative columns too. A maximum is found many at a time, a comparison is not.
  for (int64_t block = 0; block < matrix.blocks; ++block)
    most = std::max(most, static_cast<uint16_t>(matrix.columns[block]));
  TORCH_CHECK(is_ascending && (matrix.blocks == 0 || most < groups),
              "the columns or row pointers of a block-sparse weight are damaged, or do not fit ", 4 * groups,
              " input features");
}

// The stride from each position of floats [..., channels] to the next; none where it is not always the same.
inline std::optional<int64_t> position_stride(const Tensor& floats) {
  std::optional<int64_t> stride;
  int64_t count = 1;
  for (int64_t dim = floats.dim() - 2; dim >= 0; --dim) {
    if (floats.size(dim) == 1) continue;
    if (!stride) stride = floats.stride(dim);
    if (floats.stride(dim) != *stride * count) return std::nullopt;
    count *= floats.size(dim);
  }
  return stride.value_or(floats.size(-1));
}

// The windows that a kernel takes of images [batch, height, width, channels].
inline Windows windows_of(const Tensor& images, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                          at::IntArrayRef dilation) {
  TORCH_CHECK_VALUE(images.dim() == 4, "expected images [batch, height, width, channels], not ", images.sizes());
  const auto is_pair = [](at::IntArrayRef sizes, int64_t least) {
    return sizes.size() == 2 && sizes[0] >= least && sizes[1] >= least;
  };
  TORCH_CHECK_VALUE(is_pair(kernel, 1) && is_pair(stride, 1) && is_pair(padding, 0) && is_pair(dilation, 1),
                    "kernel, stride and dilation are two numbers from 1, padding two from 0, not ", kernel, ", ",
                    stride, ", ", dilation, " and ", padding);
  const int64_t bytes = images.size(3) * static_cast<int64_t>(images.element_size());
  Windows windows{images.size(1), images.size(2), bytes, 0, 0, {}, {}, {}, {}};
  for (int i = 0; i < 2; ++i) {
    windows.kernel[i] = kernel[i];
    windows.stride[i] = stride[i];
    windows.padding[i] = padding[i];
    windows.dilation[i] = dilation[i];
    const int64_t room = images.size(1 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, "a kernel of ", kernel, " does not fit images of shape ", images.sizes());
    (i == 0 ? windows.out_height : windows.out_width) = room / stride[i] + 1;
  }
  return windows;
}

}  // namespace fxprune
