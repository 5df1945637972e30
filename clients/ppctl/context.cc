#include "clients/ppctl/context.h"

#include <google/protobuf/util/json_util.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <tuple>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "clients/ppctl/format.h"
#include "common/base/address.h"
#include "common/base/files.h"
#include "common/base/format.h"
#include "common/base/status.h"
#include "common/net/channel.h"
#include "common/net/status.h"
#include "common/spec/spec.h"

namespace ppft::ctl {
namespace {

using OrderedJson = nlohmann::ordered_json;

// Can no YAML version take the bare text for something else? Whole numbers stay bare, since proto JSON writes 64-bit ones as text.
bool IsBare(const std::string& text) {
  int64_t number;
  if (text.size() < 20 && absl::SimpleAtoi(text, &number) && absl::StrCat(number) == text) return true;
  for (const char* special : {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}) {
    if (absl::EqualsIgnoreCase(text, special)) return false;
  }
  return !text.empty() && absl::ascii_isalpha(text[0]) &&
         std::all_of(text.begin(), text.end(), [](char c) { return absl::ascii_isalnum(c) || c == '_' || c == '-' || c == '.' || c == '/'; });
}

void Emit(const std::string& text, YAML::Emitter* out) {
  if (!IsBare(text)) *out << YAML::DoubleQuoted;
  *out << text;
}

void Emit(const OrderedJson& value, YAML::Emitter* out) {
  if (value.is_structured() && value.empty()) *out << YAML::Flow;  // on the key's line
  if (value.is_object()) {
    *out << YAML::BeginMap;
    for (const auto& [key, item] : value.items()) {
      *out << YAML::Key;
      Emit(key, out);
      *out << YAML::Value;
      Emit(item, out);
    }
    *out << YAML::EndMap;
  } else if (value.is_array()) {
    *out << YAML::BeginSeq;
    for (const OrderedJson& item : value) Emit(item, out);
    *out << YAML::EndSeq;
  } else if (value.is_string()) {
    Emit(value.get_ref<const std::string&>(), out);
  } else if (value.is_null()) {
    *out << YAML::Null;
  } else {
    *out << value.dump();
  }
}

std::string YamlOf(const OrderedJson& value) {
  YAML::Emitter out;
  Emit(value, &out);
  return absl::StrCat(out.c_str(), "\n");
}

// By field: what the newest plan made of each "auto" in the spec. Empty before the first plan.
std::map<std::string, std::string> WhatAutoCameTo(const v1::Job& job) {
  std::map<std::string, std::string> comments;
  const v1::JobStatus& status = job.status();
  if (status.assignment().empty()) return comments;
  int stages = 0, replicas = 0;
  for (const auto& rank : status.assignment()) {
    stages = std::max(stages, rank.stage() + 1);
    replicas = std::max(replicas, rank.replica() + 1);
  }
  const v1::ParallelSpec& parallel = job.spec().parallel();
  const std::string& compute = job.spec().precision().compute();
  const std::string& device = status.assignment(0).device();
  const std::tuple<const char*, bool, std::string> fields[] = {
      {"parallel.pipeline_parallel_size", parallel.pipeline_parallel_size() == 0, absl::StrCat(stages)},
      {"parallel.data_parallel_size", parallel.data_parallel_size() == 0, absl::StrCat(replicas)},
      {"parallel.schedule", parallel.schedule() == "auto", status.schedule()},
      {"parallel.activation_checkpointing", parallel.activation_checkpointing() == "auto", status.activation_checkpointing()},
      {"parallel.merge_micro_batches", parallel.merge_micro_batches() == "auto" && status.microbatches_per_pass() > 0,
       absl::StrCat(status.microbatches_per_pass(), " in a pass")},
      {"precision.compute", compute == "auto", spec::ComputeOn(compute, device.substr(0, device.find(':')))}};
  for (const auto& [field, is_auto, value] : fields) {
    if (is_auto && !value.empty()) comments[field] = absl::StrCat("planned: ", value);
  }
  return comments;
}

constexpr int64_t kMaxTokenBytes = 8192;

// The first line of the file.
absl::StatusOr<std::string> ReadToken(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path, kMaxTokenBytes);
  if (!text.ok()) return absl::InvalidArgumentError(absl::StrCat("--token-file ", text.status().message()));
  const std::string token(absl::StripAsciiWhitespace(text->substr(0, text->find('\n'))));
  const bool good = !token.empty() && std::all_of(token.begin(), token.end(), [](char c) { return absl::ascii_isgraph(static_cast<unsigned char>(c)); });
  if (!good) return absl::InvalidArgumentError(absl::StrCat("--token-file ", path, ": its first line must be the token, without blanks"));
  return token;
}

}  // namespace

int ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kOk;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
      return kUsage;
    case absl::StatusCode::kNotFound:
      return kNotFound;
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return kAuth;
    case absl::StatusCode::kUnavailable:
      return kUnavailable;
    case absl::StatusCode::kDeadlineExceeded:
      return kDeadline;
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kAborted:
      return kPrecondition;
    default:
      return kFailure;
  }
}

std::atomic<bool>& Interrupted() {
  static std::atomic<bool> interrupted{false};
  return interrupted;
}

absl::Status Context::Connect() {
  PPFT_RETURN_IF_ERROR(ParseAddress(server, "--server").status());
  net::ChannelOptions options;
  PPFT_ASSIGN_OR_RETURN(options.credentials, net::LoadCredentials(tls, "--tls-"));
  if (!token_file.empty()) {
    PPFT_ASSIGN_OR_RETURN(options.token, ReadToken(token_file));
  }
  if (!options.token.empty() && options.credentials == nullptr && !ServerIsLoopback()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the token of ", token_file, " would travel to ", server, " unencrypted: give --tls-ca, --tls-cert and --tls-key"));
  }
  channel_ = net::MakeChannel(server, options);
  jobs_ = v1::JobService::NewStub(channel_);
  datasets_ = v1::DatasetService::NewStub(channel_);
  models_ = v1::ModelService::NewStub(channel_);
  artifacts_ = v1::ArtifactService::NewStub(channel_);
  cluster_ = v1::ClusterService::NewStub(channel_);
  blobs_ = v1::BlobService::NewStub(channel_);
  return absl::OkStatus();
}

absl::Status Context::Retry(const std::function<grpc::Status(grpc::ClientContext*)>& call) {
  const absl::Time deadline = absl::Now() + timeout;
  net::Backoff backoff(absl::Milliseconds(200), absl::Seconds(2));
  for (;;) {
    grpc::ClientContext context;
    net::SetDeadline(&context, deadline - absl::Now());
    absl::Status status = net::StatusFromGrpc(call(&context));
    if (absl::IsDeadlineExceeded(status) && !reached_ && channel_->GetState(false) != GRPC_CHANNEL_READY) {
      status = absl::UnavailableError(absl::StrCat("no connection within ", absl::FormatDuration(timeout)));
    }
    if (!absl::IsUnavailable(status) && !absl::IsDeadlineExceeded(status)) reached_ = true;
    const absl::Duration pause = backoff.Next();
    if (!absl::IsUnavailable(status) || !reached_ || absl::Now() + pause >= deadline) return Explain(status);
    absl::SleepFor(pause);
  }
}

absl::Status Context::Explain(const absl::Status& status) const {
  if (absl::IsDeadlineExceeded(status)) {
    return absl::DeadlineExceededError(
        absl::StrCat("the coordinator at ", server, " did not answer within ", absl::FormatDuration(timeout), ": try again, or a longer --timeout"));
  }
  if (!absl::IsUnavailable(status)) return status;
  return absl::UnavailableError(
      absl::StrCat("cannot reach a coordinator at ", server, " (", status.message(),
                   ").\nIs it running? Start one on this machine with deploy/local up --dir DIR --workers 2, or name another with --server HOST:PORT "
                   "or PPCTL_SERVER."));
}

net::TransferOptions Context::Transfers(const std::string& label) {
  net::TransferOptions options;
  options.call_timeout = timeout;
  options.patience = timeout;
  if (terminal_->err_is_terminal) {
    options.progress = [this, label, last = absl::InfinitePast()](int64_t done, int64_t total) mutable {
      if (done < total && absl::Now() - last < absl::Milliseconds(200)) return;
      last = absl::Now();
      err() << absl::StrFormat("\r\x1b[K%s  %s of %s", label, FormatBytes(done), FormatBytes(total)) << std::flush;
    };
  }
  return options;
}

void Context::EndProgress() {
  if (terminal_->err_is_terminal) err() << "\r\x1b[K" << std::flush;
}

bool Context::PrintMessage(const google::protobuf::Message& message) {
  if (format == Format::kJson) {
    out() << ToJson(message, true);
    return true;
  }
  if (format == Format::kYaml) {
    out() << ToYamlText(message);
    return true;
  }
  return false;
}

bool Context::PrintJson(const std::string& json) {
  const OrderedJson value = OrderedJson::parse(json);
  if (format == Format::kJson) {
    out() << value.dump(1) << "\n";
    return true;
  }
  if (format != Format::kYaml) return false;
  out() << YamlOf(value);
  return true;
}

bool Context::ServerIsLoopback() const {
  const absl::StatusOr<Address> address = ParseAddress(server, "--server");
  return address.ok() && IsLoopback(address->host);
}

std::string NewRequestId() {
  std::random_device random;
  std::string id;
  for (int i = 0; i < 4; ++i) absl::StrAppendFormat(&id, "%08x", random());
  return id;
}

std::string ToJson(const google::protobuf::Message& message, bool pretty) {
  google::protobuf::util::JsonPrintOptions options;
  options.add_whitespace = pretty;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  std::string text;
  const auto status = google::protobuf::util::MessageToJsonString(message, &text, options);
  if (!status.ok()) return absl::StrCat("{\"error\": ", OrderedJson(status.ToString()).dump(), "}\n");
  if (text.empty() || text.back() != '\n') text += '\n';
  return text;
}

std::string ToYamlText(const google::protobuf::Message& message) {
  if (message.GetDescriptor() == v1::Job::descriptor()) {
    v1::Job job;
    job.CopyFrom(message);
    const std::string spec = spec::ToYaml(job.spec(), WhatAutoCameTo(job));
    job.clear_spec();
    std::string text = YamlOf(OrderedJson::parse(ToJson(job, false))) + "spec:\n";
    for (const absl::string_view line : absl::StrSplit(spec, '\n', absl::SkipEmpty())) absl::StrAppend(&text, "  ", line, "\n");
    return text;
  }
  if (message.GetDescriptor() == v1::JobSpec::descriptor()) {
    v1::JobSpec spec;
    spec.CopyFrom(message);
    return spec::ToYaml(spec);
  }
  return YamlOf(OrderedJson::parse(ToJson(message, false)));
}

}  // namespace ppft::ctl
