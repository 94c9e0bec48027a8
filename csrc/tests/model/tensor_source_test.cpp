// Looking tensors up (tensor_source.cpp): both spellings, and every complaint names its tensor.
#include "model/tensor_source.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cstdio>

#include "core/error.h"

namespace duplex {
namespace {

const std::array<float, 6> kValues = {1, 2, 3, 4, 5, 6};

SourceTensor tensor(const std::string& name, std::vector<std::int64_t> shape = {2, 3}) {
  return {name,
          FileType::kF32,
          std::move(shape),
          reinterpret_cast<const std::byte*>(kValues.data()),
          false,
          {}};
}

TEST_CASE("a tensor knows its size and its elements") {
  const SourceTensor t = tensor("t");
  CHECK(t.elements() == 6);
  CHECK(t.bytes() == 24);
  CHECK(*reinterpret_cast<const float*>(t.at(4)) == 5.0f);
  CHECK(tensor("scalar", {}).elements() == 1);
  CHECK(shape_text({2, 3}) == "(2, 3)");
  CHECK(shape_text({}) == "()");
}

TEST_CASE("tensors are found in either spelling by their published name") {
  TensorSource source({tensor("model.llm.norm.weight"), tensor("lm_head.weight"),
                       tensor("model.layers.0.input_layernorm.weight")});
  CHECK(source.find("model.llm.norm.weight").name == "model.llm.norm.weight");
  CHECK(source.find("model.llm.unembed.weight").shape == std::vector<std::int64_t>{2, 3});
  CHECK(source.try_find("model.llm.layers.0.attn_norm.weight") != nullptr);
  CHECK(source.try_find("model.llm.embed.weight") == nullptr);
  CHECK_NOTHROW(source.check_all_used());
}

TEST_CASE("a missing tensor is named in both spellings") {
  TensorSource source({});
  CHECK_THROWS_AS(source.find("model.llm.norm.weight"), CheckpointError);
  CHECK_THROWS_WITH(source.find("model.llm.norm.weight"),
                    Catch::Contains("'model.llm.norm.weight' is missing") &&
                        Catch::Contains("'model.language_model.norm.weight'"));
  CHECK_THROWS_WITH(source.find("unknown"), "checkpoint: tensor 'unknown' is missing");
}

TEST_CASE("a tensor of another shape is named with both shapes") {
  TensorSource source({tensor("model.llm.norm.weight")});
  CHECK_NOTHROW(source.find("model.llm.norm.weight", {2, 3}));
  CHECK_THROWS_AS(source.find("model.llm.norm.weight", {3, 2}), CheckpointError);
  CHECK_THROWS_WITH(source.find("model.llm.norm.weight", {6}),
                    Catch::Contains("'model.llm.norm.weight'") && Catch::Contains("(6)") &&
                        Catch::Contains("(2, 3)"));
}

TEST_CASE("tensors that nobody asked for are named, but not endlessly") {
  TensorSource two({tensor("a"), tensor("model.mtp.layers.0.x"), tensor("b")});
  CHECK_THROWS_AS(two.check_all_used(), CheckpointError);
  CHECK_THROWS_WITH(two.check_all_used(),
                    Catch::Contains("2 tensors") && Catch::Contains("'a', 'b'"));
  two.find("a");
  CHECK_THROWS_WITH(two.check_all_used(), Catch::Contains("1 tensor is") && Catch::Contains("'b'"));
  two.find("b");
  CHECK_NOTHROW(two.check_all_used());

  std::vector<SourceTensor> many;
  for (int i = 0; i < 30; ++i) many.push_back(tensor("extra" + std::to_string(i)));
  CHECK_THROWS_WITH(TensorSource(many).check_all_used(),
                    Catch::Contains("30 tensors") && Catch::Contains("..."));
}

TEST_CASE("a name that appears twice is refused") {
  CHECK_THROWS_AS(TensorSource({tensor("a"), tensor("a")}), CheckpointError);
  CHECK_THROWS_WITH(TensorSource({tensor("a"), tensor("a")}), Catch::Contains("'a' appears twice"));
}

TEST_CASE("pages of a file that were given back read as before") {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::FILE* const file = std::tmpfile();
  REQUIRE(file != nullptr);
  const std::vector<char> content(4 * page, 'x');
  REQUIRE(std::fwrite(content.data(), 1, content.size(), file) == content.size());
  REQUIRE(std::fflush(file) == 0);
  void* const mapped = mmap(nullptr, 4 * page, PROT_READ, MAP_PRIVATE, fileno(file), 0);
  REQUIRE(mapped != MAP_FAILED);
  // The tensor starts in the middle of a page: only whole pages inside it may go.
  SourceTensor t{"t",
                 FileType::kF32,
                 {static_cast<std::int64_t>(3 * page / 4)},
                 static_cast<const std::byte*>(mapped) + page / 2,
                 true,
                 {}};
  t.release(0, t.elements());
  t.release(5, 5);
  const auto* bytes = static_cast<const char*>(mapped);
  CHECK(std::all_of(bytes, bytes + 4 * page, [](char c) { return c == 'x'; }));
  munmap(mapped, 4 * page);
  std::fclose(file);
}

}  // namespace
}  // namespace duplex
