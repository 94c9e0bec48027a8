#include "backend/registry.h"

#include <array>
#include <utility>

#include "core/error.h"

namespace duplex {

#define DUPLEX_BACKEND(name) \
  std::unique_ptr<Backend> create_##name##_backend(const BackendOptions& options);
#include "backend_list.inc"
#undef DUPLEX_BACKEND

namespace {

struct Entry {
  const char* name;
  std::unique_ptr<Backend> (*create)(const BackendOptions&);
};

constexpr std::array kBackends = {
#define DUPLEX_BACKEND(name) Entry{#name, &create_##name##_backend},
#include "backend_list.inc"
#undef DUPLEX_BACKEND
};

}  // namespace

std::vector<std::string> backend_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kBackends) names.emplace_back(entry.name);
  return names;
}

std::unique_ptr<Backend> create_backend(const std::string& name, const BackendOptions& options) {
  for (const Entry& entry : kBackends)
    if (name == entry.name) return entry.create(options);
  std::string known;
  for (const Entry& entry : kBackends)
    known += (known.empty() ? "'" : ", '") + std::string(entry.name) + "'";
  fail<InvalidArgument>("device: expected one of ", known, ", found '", name, "'");
}

}  // namespace duplex
