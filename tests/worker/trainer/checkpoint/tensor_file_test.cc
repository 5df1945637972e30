// Tensors to files and back; sources of files and folders; what is refused.
#include "worker/trainer/checkpoint/tensor_file.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "common/base/files.h"

namespace ppft::trainer {
namespace {

class TensorFileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = JoinPath(testing::TempDir(), "tensor_file_XXXXXX");
    folder_ = mkdtemp(pattern.data());
  }
  void TearDown() override { EXPECT_TRUE(RemoveAll(folder_).ok()); }
  std::string Path(const std::string& name) const { return JoinPath(folder_, name); }

  std::string folder_;
};

TEST_F(TensorFileTest, EveryDtypeComesBackEqual) {
  std::vector<NamedTensor> tensors;
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble, at::kLong, at::kInt, at::kByte}) {
    tensors.push_back({c10::toString(type), (at::randn({3, 5}) * 100).abs().to(type)});
  }
  tensors.push_back({"strided", at::randn({4, 6}).t()});
  tensors.push_back({"scalar", at::tensor(3.5)});
  tensors.push_back({"empty", at::zeros({0, 4})});
  const auto written = WriteTensorFile(Path("t"), tensors, {{"step", "7"}});
  ASSERT_TRUE(written.ok()) << written.status();
  EXPECT_EQ(written->size_bytes, *FileSize(Path("t")));
  EXPECT_EQ(written->sha256, *Sha256File(Path("t")));
  const auto file = TensorFile::Open(Path("t"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->header().metadata.at("step"), "7");
  EXPECT_EQ(file->header().tensors.size(), tensors.size());
  for (const NamedTensor& t : tensors) {
    const auto back = file->Read(t.name);
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(back->scalar_type(), t.tensor.scalar_type());
    EXPECT_TRUE(at::equal(*back, t.tensor)) << t.name;
  }
  EXPECT_EQ(file->Read("other").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(WriteTensorFile(Path("again"), tensors, {{"step", "7"}})->sha256, written->sha256);
}

TEST_F(TensorFileTest, TensorsOutliveTheFile) {
  const at::Tensor value = at::randn({100});
  ASSERT_TRUE(WriteTensorFile(Path("t"), {{"a", value}}, {}).ok());
  at::Tensor back;
  {
    const auto file = TensorFile::Open(Path("t"));
    ASSERT_TRUE(file.ok());
    back = *file->Read("a");
  }
  ASSERT_TRUE(RemoveAll(Path("t")).ok());
  EXPECT_TRUE(at::equal(back, value));
}

TEST_F(TensorFileTest, TensorAtAnOddAddressIsRead) {
  const at::Tensor bytes = at::tensor({1, 2, 3}, at::kByte), value = at::randn({7});
  ASSERT_TRUE(WriteTensorFile(Path("t"), {{"bytes", bytes}, {"value", value}}, {}).ok());
  EXPECT_TRUE(at::equal(*TensorFile::Open(Path("t"))->Read("value"), value));
}

TEST_F(TensorFileTest, DamagedFilesAreRefused) {
  ASSERT_TRUE(WriteTensorFile(Path("t"), {{"a", at::randn({100})}}, {}).ok());
  const std::string whole = *ReadFile(Path("t"));
  for (const size_t size : {size_t{0}, size_t{7}, size_t{20}, whole.size() - 1}) {
    ASSERT_TRUE(WriteFileAtomic(Path("short"), whole.substr(0, size)).ok());
    const absl::Status status = TensorFile::Open(Path("short")).status();
    EXPECT_FALSE(status.ok()) << size;
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("short")) << size;
  }
  EXPECT_EQ(TensorFile::Open(Path("missing")).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(TensorFileTest, RawTensorMustHaveItsSize) {
  const at::Tensor value = at::randn({4, 3});
  const absl::string_view bytes(static_cast<const char*>(value.data_ptr()), value.nbytes());
  ASSERT_TRUE(WriteFileAtomic(Path("raw"), bytes).ok());
  const auto back = MapRawTensor(Path("raw"), at::kFloat, {4, 3});
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_TRUE(at::equal(*back, value));
  EXPECT_EQ(MapRawTensor(Path("raw"), at::kFloat, {4, 4}).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(TensorFileTest, EachTensorComesFromTheFileThatHasIt) {
  const at::Tensor a = at::randn({3}), b = at::randn({2, 2});
  ASSERT_TRUE(WriteTensorFile(Path("model-1.safetensors"), {{"a", a}}, {}).ok());
  ASSERT_TRUE(WriteTensorFile(Path("model-2.safetensors"), {{"a", b}, {"b", b}}, {}).ok());
  const auto source = SourceOfFiles({Path("model-1.safetensors"), Path("model-2.safetensors")});
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_TRUE(at::equal(*(*source)("a"), a));
  EXPECT_TRUE(at::equal(*(*source)("b"), b));
  EXPECT_EQ((*source)("c").status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace ppft::trainer
