// Engine, Session and Turn. Arrays are read where they lie. Every call that computes or takes a
// lock releases the GIL: whoever holds the lock may need it (torch_transport.cpp).
#include "engine/engine.h"

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/bindings.h"
#include "core/error.h"

namespace duplex {
namespace {

using FloatArray = py::array_t<float, py::array::c_style>;

// Borrows a 1-D float32 array, or converts a 1-D int16 array (full scale 32768).
class Samples {
 public:
  explicit Samples(const py::array& array) {
    check(array.ndim() == 1, "audio: expected one dimension of samples, found ", array.ndim());
    if (py::isinstance<FloatArray>(array)) {
      span_ = {static_cast<const float*>(array.data()), static_cast<std::size_t>(array.size())};
    } else if (py::isinstance<py::array_t<std::int16_t, py::array::c_style>>(array)) {
      const auto* samples = static_cast<const std::int16_t*>(array.data());
      for (py::ssize_t i = 0; i < array.size(); ++i)
        converted_.push_back(static_cast<float>(samples[i]) / 32768.0f);
      span_ = converted_;
    } else {
      fail("audio: expected contiguous float32 or int16 samples, found ",
           py::str(array.dtype()).cast<std::string>());
    }
  }
  std::span<const float> span() const { return span_; }

 private:
  std::vector<float> converted_;
  std::span<const float> span_;
};

Image image_from(const py::array& array) {
  check(array.ndim() == 3 && array.shape(2) == 3 &&
            py::isinstance<py::array_t<std::uint8_t, py::array::c_style>>(array),
        "image: expected a contiguous uint8 array (height, width, 3), found ",
        py::str(py::repr(array.dtype())).cast<std::string>(), " with ", array.ndim(),
        " dimensions");
  constexpr py::ssize_t kMaxEdge = 1 << 20;
  check(array.shape(0) <= kMaxEdge && array.shape(1) <= kMaxEdge, "image: expected at most ",
        kMaxEdge, " pixels an edge, found ", array.shape(0), "x", array.shape(1));
  Image image;
  image.height = static_cast<std::int32_t>(array.shape(0));
  image.width = static_cast<std::int32_t>(array.shape(1));
  const auto* pixels = static_cast<const std::uint8_t*>(array.data());
  image.pixels.assign(pixels, pixels + array.nbytes());
  return image;
}

LaneKind lane_kind(bool background) {
  return background ? LaneKind::kBackground : LaneKind::kInteraction;
}

LogitsWanted wanted_from(const std::string& name) {
  if (name == "none") return LogitsWanted::kNone;
  if (name == "last") return LogitsWanted::kLast;
  if (name == "all") return LogitsWanted::kAll;
  fail("logits: expected 'none', 'last' or 'all', found '", name, "'");
}

// Hands a result to numpy without copying it.
py::array_t<float> rows_array(std::vector<float> values, std::int32_t width) {
  auto* owned = new std::vector<float>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<float>*>(p); });
  return py::array_t<float>(
      {static_cast<py::ssize_t>(owned->size()) / width, static_cast<py::ssize_t>(width)},
      owned->data(), owner);
}

// What the one of three functions that takes this kind of input makes of it.
template <class OfText, class OfAudio, class OfImage>
std::vector<float> rows_of(const std::string& kind, const py::object& data, const OfText& of_text,
                           const OfAudio& of_audio, const OfImage& of_image) {
  if (kind == "text") {
    const auto ids = data.cast<std::vector<std::int32_t>>();
    const ReleaseGil release;
    return of_text(ids);
  }
  if (kind == "audio") {
    const Samples samples(data.cast<py::array>());
    const ReleaseGil release;
    return of_audio(samples.span());
  }
  check(kind == "image", "kind: expected 'text', 'audio' or 'image', found '", kind, "'");
  Image image = image_from(data.cast<py::array>());
  const ReleaseGil release;
  return of_image(std::move(image));
}

// The rows of one kind of input, as they would enter a sequence.
py::array_t<float> embed(Engine& engine, const std::string& kind, const py::object& data) {
  return rows_array(rows_of(
                        kind, data, [&](const auto& ids) { return engine.embed_text(ids); },
                        [&](const auto& samples) { return engine.embed_audio(samples); },
                        [&](Image image) { return engine.embed_image(std::move(image)); }),
                    engine.config().d_model);
}

// The dMel bins of a whole recording: (frames, n_mels).
py::array_t<std::uint8_t> dmel_bins(const py::array& samples, std::int32_t n_mels) {
  const DmelAnalyzer analyzer({.n_mels = n_mels});
  DmelStream stream(analyzer);
  stream.push(Samples(samples).span());
  stream.pad_to_frame();
  py::array_t<std::uint8_t> bins(
      {static_cast<py::ssize_t>(stream.frames_ready()), static_cast<py::ssize_t>(n_mels)});
  stream.take(stream.frames_ready(), bins.mutable_data());
  return bins;
}

py::object append(Session& session, const std::string& kind, const py::object& data,
                  const std::string& logits, bool end_of_audio) {
  const LogitsWanted wanted = wanted_from(logits);
  Lane& lane = session.lane();
  std::vector<float> values = rows_of(
      kind, data, [&](const auto& ids) { return lane.append_text(session, ids, wanted); },
      [&](const auto& samples) {
        return lane.append_audio(session, samples, end_of_audio, wanted);
      },
      [&](Image image) { return lane.append_image(session, std::move(image), wanted); });
  if (wanted == LogitsWanted::kNone) return py::none();
  return rows_array(std::move(values), session.engine().config().unpadded_vocab_size);
}

using EndlessChoice = std::optional<std::variant<bool, std::pair<std::int64_t, std::int64_t>>>;

std::optional<Endless> endless_from(const EndlessChoice& choice) {
  if (!choice) return std::nullopt;
  if (const auto* window = std::get_if<std::pair<std::int64_t, std::int64_t>>(&*choice))
    return Endless{window->first, window->second};
  if (!std::get<bool>(*choice)) return std::nullopt;
  return Endless{.is_automatic = true};
}

std::pair<std::int64_t, std::int64_t> pair_from(const PositionRange& range) {
  return {range.begin, range.end};
}

const char* stop_name(StopReason reason) {
  switch (reason) {
    case StopReason::kListen:
      return "listen";
    case StopReason::kEndOfText:
      return "eos";
    case StopReason::kLimit:
      return "limit";
    case StopReason::kInterrupted:
      return "interrupted";
  }
  return "limit";
}

// A Turn, or the exception that belongs to its session.
py::typing::List<py::object> turn_list(std::vector<Turn> turns) {
  py::typing::List<py::object> list;
  for (Turn& turn : turns) {
    if (!turn.error) {
      list.append(py::cast(std::move(turn)));
      continue;
    }
    try {
      std::rethrow_exception(turn.error);
    } catch (const Error& e) {
      const char* const name = dynamic_cast<const SessionClosed*>(&e)   ? "SessionClosed"
                               : dynamic_cast<const CapacityError*>(&e) ? "CapacityError"
                               : dynamic_cast<const RankFailed*>(&e)    ? "RankFailed"
                                                                        : "InvalidArgument";
      list.append(py::module_::import("duplex_engine._core").attr(name)(e.what()));
    }
  }
  return list;
}

void bind_turn(py::module_& m) {
  py::class_<Turn>(m, "Turn", "What one session's micro-turn did.")
      .def_readonly("token_ids", &Turn::token_ids)
      .def_readonly("turn", &Turn::turn)
      .def_readonly("epoch", &Turn::epoch)
      .def_readonly("position", &Turn::position)
      .def_readonly("n_rows", &Turn::n_rows)
      .def_readonly("merged_turns", &Turn::merged_turns)
      .def_readonly("missing_samples", &Turn::missing_samples)
      .def_property_readonly("forgotten", [](const Turn& t) { return pair_from(t.forgotten); })
      .def_readonly("kv_bytes", &Turn::kv_bytes)
      .def_readonly("n_drafted", &Turn::n_drafted)
      .def_readonly("n_accepted", &Turn::n_accepted)
      .def_property_readonly("stopped", [](const Turn& t) { return stop_name(t.stopped); })
      .def_property_readonly("encode_us", [](const Turn& t) { return t.timing.encode_us; })
      .def_property_readonly("append_us", [](const Turn& t) { return t.timing.append_us; })
      .def_property_readonly("decode_us", [](const Turn& t) { return t.timing.decode_us; })
      .def_property_readonly("total_us", [](const Turn& t) { return t.timing.total_us; });
}

void bind_session(py::module_& m) {
  using Gil = py::call_guard<ReleaseGil>;
  py::class_<Session, std::shared_ptr<Session>>(
      m, "Session", py::release_gil_before_calling_cpp_dtor(), "One user's stream.")
      .def_property_readonly("closed", &Session::is_closed)
      .def_property_readonly("length", py::cpp_function(&Session::length, Gil()))
      .def_property_readonly("max_positions", py::cpp_function(&Session::max_positions, Gil()))
      .def_property_readonly("turn", &Session::turn)
      .def_property_readonly("epoch", &Session::epoch)
      .def_property_readonly(
          "background", [](const Session& s) { return s.lane().kind() == LaneKind::kBackground; })
      .def(
          "feed_audio",
          [](Session& s, const py::array& samples) {
            const Samples converted(samples);
            const ReleaseGil release;
            s.feed_audio(converted.span());
          },
          py::arg("samples"))
      .def(
          "feed_image",
          [](Session& s, const py::array& array) {
            Image image = image_from(array);
            const ReleaseGil release;
            s.feed_image(std::move(image));
          },
          py::arg("image"))
      .def(
          "feed_text", [](Session& s, const std::vector<std::int32_t>& ids) { s.feed_text(ids); },
          py::arg("ids"), Gil())
      .def(
          "feed_result",
          [](Session& s, const std::vector<std::int32_t>& ids) { s.feed_result(ids); },
          py::arg("ids"), Gil())
      .def("append", &append, py::arg("kind"), py::arg("data"), py::kw_only(),
           py::arg("logits") = "none", py::arg("end_of_audio") = false)
      .def(
          "decode",
          [](Session& s, std::int32_t n, const std::vector<std::int32_t>& stop) {
            return s.lane().decode(s, n, stop);
          },
          py::arg("n"), py::arg("stop"), Gil())
      .def("truncate", &Session::truncate, py::arg("length"), Gil())
      .def(
          "fork",
          [](Session& s, std::int64_t max_positions, bool background) {
            return s.fork(max_positions, lane_kind(background));
          },
          py::arg("max_positions"), py::arg("background"), Gil(),
          "max_positions: 0 for those of this session.")
      .def(
          "forget",
          [](Session& s, std::int64_t begin, std::int64_t end) {
            return pair_from(s.forget(begin, end));
          },
          py::arg("begin"), py::arg("end"), Gil())
      .def(
          "forgotten",
          [](const Session& s) {
            std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
            for (const PositionRange& range : s.forgotten()) ranges.push_back(pair_from(range));
            return ranges;
          },
          Gil())
      .def_property_readonly(
          "endless",
          [](const Session& s) -> std::optional<std::tuple<std::int64_t, std::int64_t, bool>> {
            const std::optional<Endless>& endless = s.endless();
            if (!endless) return std::nullopt;
            return std::tuple{endless->head, endless->recent, endless->is_automatic};
          },
          "(head, recent) in positions, and whether they follow from max_positions")
      .def("marks", &Session::marks, Gil())
      .def(
          "draft_logits",
          [](Session& s) {
            std::vector<float> logits = [&s] {
              const ReleaseGil release;
              return s.lane().draft_logits(s);
            }();
            return rows_array(std::move(logits), s.engine().config().unpadded_vocab_size);
          },
          "Logits of each multi-token-prediction layer behind the token that waits, for tests.")
      .def("digests", &Session::digests, Gil(),
           "(tape, block, hash) of every whole block that is held and committed.")
      .def("memory",
           [](Session& s) {
             const auto [usage, draft_bytes] = [&s] {
               const ReleaseGil release;
               return std::pair{s.usage(), s.draft_bytes()};
             }();
             py::typing::Dict<py::str, py::int_> memory;
             memory["global_bytes"] = usage.global.held_bytes;
             memory["local_bytes"] = usage.local.held_bytes;
             memory["conv_bytes"] = usage.conv.held_bytes;
             memory["shared_bytes"] =
                 usage.held_bytes() - (usage.global.private_bytes + usage.local.private_bytes +
                                       usage.conv.private_bytes);
             memory["draft_bytes"] = draft_bytes;
             return memory;
           })
      .def(
          "set_sampling",
          [](Session& s, std::uint64_t seed, float temperature, std::int32_t top_k, float top_p) {
            s.set_sampling({seed, temperature, top_k, top_p});
          },
          py::kw_only(), py::arg("seed"), py::arg("temperature"), py::arg("top_k"),
          py::arg("top_p"))
      .def("interrupt", &Session::interrupt)
      .def("close", &Session::close, Gil());
}

py::typing::Dict<py::str, py::int_> stats_dict(const Engine& engine) {
  const EngineStats stats = [&] {
    const ReleaseGil release;
    return engine.stats();
  }();
  py::typing::Dict<py::str, py::int_> values;
  values["page_bytes"] = stats.pool.page_bytes;
  values["pages_total"] = stats.pool.n_pages;
  values["pages_used"] = stats.pool.n_used;
  values["pages_free"] = stats.pool.n_free;
  values["pages_promised"] = stats.pool.n_promised;
  values["sessions"] = stats.n_sessions;
  values["passes"] = stats.passes;
  values["rows"] = stats.rows;
  values["drafted"] = stats.drafted;
  values["accepted"] = stats.accepted;
  values["launches"] = stats.launches;
  values["waits"] = stats.waits;
  return values;
}

}  // namespace

void bind_engine(py::module_& m) {
  using Gil = py::call_guard<ReleaseGil>;
  m.def("dmel_bins", &dmel_bins, py::arg("samples"), py::arg("n_mels") = 80,
        "dMel bins of a whole 16 kHz recording: (frames, n_mels) uint8.");
  bind_turn(m);
  bind_session(m);
  EngineClass engine_class(m, "Engine", py::release_gil_before_calling_cpp_dtor(),
                           "One checkpoint, loaded.");
  bind_loading(m, engine_class);
  engine_class
      .def(
          "open_session",
          [](Engine& engine, std::int64_t max_positions, std::uint64_t seed, float temperature,
             std::int32_t top_k, float top_p, std::int32_t speculate, bool background,
             const EndlessChoice& endless) {
            return engine.open_session({max_positions,
                                        {seed, temperature, top_k, top_p},
                                        speculate,
                                        lane_kind(background),
                                        endless_from(endless)});
          },
          py::kw_only(), py::arg("max_positions"), py::arg("seed"), py::arg("temperature"),
          py::arg("top_k"), py::arg("top_p"), py::arg("speculate"), py::arg("background"),
          py::arg("endless"), Gil(),
          "max_positions: 0 for the engine's. endless: None, True for parts that suit most, or "
          "(head, recent) in positions.")
      .def(
          "step_many",
          [](Engine& engine, const std::vector<std::shared_ptr<Session>>& sessions,
             const std::vector<std::int32_t>& max_tokens) {
            check(sessions.size() == max_tokens.size(), "step_many: ", sessions.size(),
                  " sessions and ", max_tokens.size(), " token limits");
            std::vector<StepRequest> requests;
            for (std::size_t i = 0; i < sessions.size(); ++i) {
              check(&sessions[i]->engine() == &engine, "step_many: session ", i,
                    " belongs to another engine");
              requests.push_back({sessions[i].get(), max_tokens[i]});
            }
            std::vector<Turn> turns;
            {
              const ReleaseGil release;
              turns = engine.step(requests);
            }
            return turn_list(std::move(turns));
          },
          py::arg("sessions"), py::arg("max_tokens"))
      .def("embed", &embed, py::arg("kind"), py::arg("data"))
      .def("description", &Engine::description)
      .def("memory_plan", &Engine::memory_plan, Gil())
      .def("stats", &stats_dict)
      .def_property_readonly("closed", py::cpp_function(&Engine::is_closed, Gil()))
      .def("close", &Engine::close, Gil());
}

}  // namespace duplex
