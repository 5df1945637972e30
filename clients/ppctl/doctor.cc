// doctor: what is wrong between here and the last device, each with what to do about it.
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/config.h"
#include "clients/ppctl/format.h"
#include "common/base/address.h"
#include "common/base/files.h"
#include "common/base/format.h"
#include "common/base/status.h"

namespace ppft::ctl {
namespace {

constexpr absl::Duration kClockTolerance = absl::Seconds(1);
constexpr absl::Duration kExpiresSoon = absl::Hours(30 * 24);
constexpr int64_t kDiskLow = int64_t{10} << 30;
constexpr int64_t kDiskFull = int64_t{1} << 30;
constexpr double kLeastComputeCapability = 8.0;
constexpr absl::Duration kContentsTime = absl::Hours(2);  // every byte of every model

enum class Level { kOk, kWarn, kFail };
constexpr const char* kLevels[] = {"ok", "warn", "fail"};

struct Finding {
  Level level;
  std::string check;
  std::string message;
  std::string remedy;
};

class Findings {
 public:
  void Ok(const std::string& check, const std::string& message) { list_.push_back({Level::kOk, check, message, ""}); }
  void Warn(const std::string& check, const std::string& message, const std::string& remedy) { list_.push_back({Level::kWarn, check, message, remedy}); }
  void Fail(const std::string& check, const std::string& message, const std::string& remedy) { list_.push_back({Level::kFail, check, message, remedy}); }

  size_t Count(Level level) const {
    return static_cast<size_t>(std::count_if(list_.begin(), list_.end(), [&](const Finding& finding) { return finding.level == level; }));
  }
  const std::vector<Finding>& list() const { return list_; }

 private:
  std::vector<Finding> list_;
};

std::string Signed(int64_t nanos) { return absl::StrFormat("%+.3f s", static_cast<double>(nanos) / 1e9); }

void CheckDisk(const std::string& check, const std::string& where, int64_t free, const std::string& remedy, Findings* findings) {
  const std::string message = absl::StrCat(FormatBytes(free), " free ", where);
  if (free < kDiskFull) {
    findings->Fail(check, message, remedy);
  } else if (free < kDiskLow) {
    findings->Warn(check, message, remedy);
  } else {
    findings->Ok(check, message);
  }
}

// When the certificate in a PEM file ends to be valid.
absl::StatusOr<absl::Time> ExpiryOf(const std::string& path) {
  PPFT_ASSIGN_OR_RETURN(const std::string pem, ReadFile(path));
  const std::unique_ptr<BIO, int (*)(BIO*)> bytes(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), BIO_free);
  const std::unique_ptr<X509, void (*)(X509*)> certificate(PEM_read_bio_X509(bytes.get(), nullptr, nullptr, nullptr), X509_free);
  tm end = {};
  if (certificate == nullptr || ASN1_TIME_to_tm(X509_get0_notAfter(certificate.get()), &end) != 1) {
    return absl::InvalidArgumentError(absl::StrCat(path, " holds no PEM certificate"));
  }
  return absl::FromTimeT(timegm(&end));
}

void CheckTls(Context& context, Findings* findings) {
  if (context.tls.ca.empty()) {
    if (context.ServerIsLoopback()) return findings->Ok("tls", "not encrypted, and not needed: the coordinator is on this machine");
    return findings->Warn("tls", absl::StrCat("the connection to ", context.server, " is not encrypted"), "give --tls-ca, --tls-cert and --tls-key");
  }
  for (const auto& [what, path] : {std::make_pair("own certificate", context.tls.certificate), std::make_pair("authority", context.tls.ca)}) {
    const absl::StatusOr<absl::Time> expiry = ExpiryOf(path);
    if (!expiry.ok()) {
      findings->Warn("tls", std::string(expiry.status().message()), "name a PEM certificate");
      continue;
    }
    const std::string until = absl::FormatTime("%Y-%m-%d %H:%M UTC", *expiry, absl::UTCTimeZone());
    if (*expiry < absl::Now()) {
      findings->Fail("tls", absl::StrCat("the ", what, " ", path, " expired at ", until), "have a new one made");
    } else if (*expiry < absl::Now() + kExpiresSoon) {
      findings->Warn("tls", absl::StrCat("the ", what, " ", path, " expires at ", until), "have a new one made");
    } else {
      findings->Ok("tls", absl::StrCat("mutual TLS, the ", what, " is valid until ", until));
    }
  }
}

void CheckVersion(const std::string& check, const std::string& who, const std::string& version, const std::string& ours, Findings* findings) {
  if (version == ours) return;
  findings->Warn(check, absl::StrCat(who, " is of version ", version.empty() ? "unknown" : version, ", ppctl of ", ours), "install one version everywhere");
}

// Equal devices together: "2 x NVIDIA H200 (cuda:0, cuda:1), 140.4 GiB each, compute capability 9.0, driver 580.65".
std::vector<std::string> DescribeDevices(const v1::Worker& worker) {
  std::vector<std::pair<std::string, std::vector<std::string>>> groups;
  for (const v1::Device& device : worker.devices()) {
    std::string text = absl::StrCat(device.name(), "|", device.memory_bytes(), "|", device.threads(), "|", device.compute_capability(), "|", device.driver());
    const auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& entry) { return entry.first == text; });
    if (group == groups.end()) {
      groups.push_back({text, {device.id()}});
    } else {
      group->second.push_back(device.id());
    }
  }
  std::vector<std::string> lines;
  for (const auto& [key, ids] : groups) {
    const auto device =
        std::find_if(worker.devices().begin(), worker.devices().end(), [&, &first = ids.front()](const v1::Device& d) { return d.id() == first; });
    std::string line = absl::StrCat(ids.size() > 1 ? absl::StrCat(ids.size(), " x ") : "", device->name().empty() ? device->kind() : device->name(), " (",
                                    absl::StrJoin(ids, ", "), "), ", HardwareText(*device));
    lines.push_back(std::move(line));
  }
  return lines;
}

void CheckDevices(const v1::Worker& worker, const std::string& check, Findings* findings) {
  for (const std::string& line : DescribeDevices(worker)) findings->Ok(check, line);
  for (const v1::Device& device : worker.devices()) {
    double capability = 0;
    if (device.kind() != "cuda" || !absl::SimpleAtod(device.compute_capability(), &capability) || capability >= kLeastComputeCapability) continue;
    findings->Fail(check, absl::StrCat(device.id(), " has compute capability ", device.compute_capability(), ", 8.0 is the least"),
                   "leave it out of the worker's --devices");
  }
}

void CheckHost(const v1::Worker& worker, const std::string& check, Findings* findings) {
  const v1::HostFacts& host = worker.host();
  std::vector<std::string> facts = {absl::StrCat("trainers at ", worker.address())};
  if (!host.network_interface().empty()) {
    facts.push_back(absl::StrCat("interface ", host.network_interface(), host.link_mbits() > 0 ? absl::StrCat(" at ", host.link_mbits(), " Mbit/s") : ""));
  }
  if (!host.torch().empty()) facts.push_back(host.torch());
  if (!host.nccl().empty()) {
    facts.push_back(absl::StrCat("NCCL ", host.nccl(), host.nccl_interface().empty() ? "" : absl::StrCat(" over ", host.nccl_interface())));
  }
  findings->Ok(check, absl::StrCat("host ", host.hostname().empty() ? "unknown" : host.hostname(), ": ", absl::StrJoin(facts, ", ")));
  if (worker.disk_free_bytes() > 0) {
    CheckDisk(check, absl::StrCat("on the disk of its --work_dir"), worker.disk_free_bytes(), "make room there, or lower --cache_limit_gib", findings);
  }
  if (!worker.has_clock()) return;
  const int64_t offset = worker.clock().offset_nanos();
  if (std::llabs(offset) > absl::ToInt64Nanoseconds(kClockTolerance)) {
    findings->Warn(check, absl::StrCat("its clock differs from the coordinator's by ", Signed(-offset)), "let both hosts follow a time server");
  }
}

void CheckWorker(const v1::Worker& worker, const std::string& ours, Findings* findings) {
  const std::string check = absl::StrCat("worker ", worker.name());
  if (worker.state() == "lost") {
    const std::string last =
        worker.has_heartbeat_age() ? absl::StrCat("; its last sign of life is ", ShortDuration(ToDuration(worker.heartbeat_age())), " old") : "";
    return findings->Fail(check, absl::StrCat("lost: it is not connected", last),
                          absl::StrCat("look whether ppft-worker runs on ", worker.host().hostname().empty() ? "its host" : worker.host().hostname(),
                                       " and reaches the coordinator, or start it again"));
  }
  for (const std::string& problem : worker.problems()) {
    if (worker.state() == "unusable") {
      findings->Fail(check, Printable(problem), "it looks again every minute once that is there");
    } else {
      findings->Warn(check, Printable(problem), "");
    }
  }
  CheckVersion(check, "it", worker.version(), ours, findings);
  CheckDevices(worker, check, findings);
  CheckHost(worker, check, findings);
}

// What only shows when workers are looked at together.
void CheckTogether(const std::vector<v1::Worker>& ready, Findings* findings) {
  std::set<std::string> hosts, torches, nccls;
  for (const v1::Worker& worker : ready) {
    hosts.insert(worker.host().hostname());
    if (!worker.host().torch().empty()) torches.insert(worker.host().torch().substr(0, worker.host().torch().find(" at ")));
    if (!worker.host().nccl().empty()) nccls.insert(worker.host().nccl());
  }
  if (torches.size() > 1) findings->Warn("workers", absl::StrCat("trainers run with ", absl::StrJoin(torches, " and ")), "install one torch on all hosts");
  if (nccls.size() > 1)
    findings->Fail("workers", absl::StrCat("NCCL ", absl::StrJoin(nccls, " and "), " do not talk to each other"), "install one torch on all hosts");
  if (hosts.size() < 2) return;
  for (const v1::Worker& worker : ready) {
    if (!IsLoopback(worker.address())) continue;
    findings->Fail(absl::StrCat("worker ", worker.name()),
                   absl::StrCat("there are ", hosts.size(), " hosts, and its trainers listen at ", worker.address(), ", which others cannot reach"),
                   "start it with --address and the host's own address");
  }
}

absl::Status CheckWorkers(Context& context, const std::string& ours, Findings* findings) {
  v1::ListWorkersResponse response;
  PPFT_RETURN_IF_ERROR(context.Call(context.cluster(), &v1::ClusterService::StubInterface::ListWorkers, v1::ListWorkersRequest(), &response));
  std::vector<v1::Worker> ready;
  for (const v1::Worker& worker : response.workers()) {
    CheckWorker(worker, ours, findings);
    if (worker.state() == "ready") ready.push_back(worker);
  }
  if (ready.empty()) {
    findings->Fail("workers", "no worker is connected that could run a job",
                   absl::StrCat("start one with ppft-worker --coordinator ", context.server, " --devices cuda:all (or cpu:2)"));
  }
  CheckTogether(ready, findings);
  return absl::OkStatus();
}

absl::Status CheckFiles(Context& context, bool contents, Findings* findings) {
  v1::CheckFilesRequest request;
  request.set_contents(contents);
  if (contents && !context.timeout_given) context.timeout = std::max(context.timeout, kContentsTime);
  v1::CheckFilesResponse response;
  PPFT_RETURN_IF_ERROR(context.Call(context.cluster(), &v1::ClusterService::StubInterface::CheckFiles, request, &response));
  for (const v1::FileProblem& problem : response.problems()) findings->Fail(problem.owner(), Printable(problem.message()), problem.remedy());
  if (response.problems().empty()) {
    findings->Ok("files", absl::StrCat(Counted(response.num_models(), "model"), " and ", Counted(response.num_datasets(), "dataset"), " are ",
                                       contents ? absl::StrCat("unchanged, ", FormatBytes(response.checked_bytes()), " read") : "there with their sizes"));
  }
  return absl::OkStatus();
}

// The coordinator itself. An error ends the visit: nothing else can be asked.
absl::Status CheckCoordinator(Context& context, const std::string& ours, Findings* findings) {
  v1::GetStatusResponse response;
  // The second call has the connection already: its time is that of a round trip.
  PPFT_RETURN_IF_ERROR(context.Call(context.cluster(), &v1::ClusterService::StubInterface::GetStatus, v1::GetStatusRequest(), &response));
  const absl::Time begin = absl::Now();
  PPFT_RETURN_IF_ERROR(context.Call(context.cluster(), &v1::ClusterService::StubInterface::GetStatus, v1::GetStatusRequest(), &response));
  const absl::Time end = absl::Now();
  findings->Ok("coordinator",
               absl::StrFormat("%s answers in %.1f ms, version %s", context.server, absl::ToDoubleMilliseconds(end - begin), response.version()));
  CheckTls(context, findings);
  CheckVersion("coordinator", "it", response.version(), ours, findings);
  if (response.has_time()) {
    const absl::Duration offset = ToTime(response.time()) - (begin + (end - begin) / 2);
    if (absl::AbsDuration(offset) > kClockTolerance + (end - begin) / 2) {
      findings->Warn("clock", absl::StrCat("the coordinator's clock differs from this machine's by ", Signed(absl::ToInt64Nanoseconds(offset))),
                     "let both follow a time server");
    } else {
      findings->Ok("clock", "this machine and the coordinator agree");
    }
  }
  CheckDisk("disk", absl::StrCat("for ", response.data_dir(), " on the coordinator"), response.data_bytes_free(), "make room on that disk", findings);
  return absl::OkStatus();
}

void Print(Context& context, const Findings& findings) {
  if (context.format == Format::kJson || context.format == Format::kYaml) {
    nlohmann::ordered_json all = {{"checks", nlohmann::ordered_json::array()}};
    for (const Finding& finding : findings.list()) {
      all["checks"].push_back(
          {{"level", kLevels[static_cast<int>(finding.level)]}, {"check", finding.check}, {"message", finding.message}, {"remedy", finding.remedy}});
    }
    context.PrintJson(all.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
    return;
  }
  constexpr const char* kColors[] = {"\x1b[32m", "\x1b[33m", "\x1b[31m"};
  for (const Finding& finding : findings.list()) {
    const auto level = static_cast<size_t>(finding.level);
    if (context.format == Format::kName) {
      if (finding.level == Level::kFail) context.out() << finding.check << "\n";
      continue;
    }
    const std::string word = absl::StrFormat("%-5s", kLevels[level]);
    context.out() << (context.terminal().color ? absl::StrCat(kColors[level], word, "\x1b[0m") : word) << " " << Printable(finding.check) << ": "
                  << finding.message << "\n";
    if (!finding.remedy.empty()) context.out() << "      what to do: " << finding.remedy << "\n";
  }
}

}  // namespace

Result Doctor(Context& context, const DoctorOptions& options) {
  Findings findings;
  if (!context.context_name.empty()) findings.Ok("config", absl::StrCat("context ", context.context_name, " of ", ConfigPath()));
  absl::Status status = CheckCoordinator(context, options.version, &findings);
  if (!status.ok()) findings.Fail("coordinator", Printable(status.message()), "");
  if (status.ok()) {
    status = CheckWorkers(context, options.version, &findings);
    if (status.ok()) status = CheckFiles(context, options.contents, &findings);
    if (absl::IsPermissionDenied(status) || absl::IsUnimplemented(status)) {
      findings.Warn("files", Printable(status.message()), "");
      status = absl::OkStatus();
    } else if (!status.ok()) {
      findings.Fail("coordinator", Printable(status.message()), "");
    }
  }
  Print(context, findings);
  const size_t failed = findings.Count(Level::kFail), warned = findings.Count(Level::kWarn);
  context.err() << (failed > 0 ? absl::StrCat(failed, " failed, ") : "")
                << (warned > 0 ? absl::StrCat(Counted(static_cast<int64_t>(warned), "warning"), ", ") : "") << findings.Count(Level::kOk) << " ok\n";
  if (!status.ok()) return ExitCodeOf(status);
  return failed > 0 ? kFailure : kOk;
}

}  // namespace ppft::ctl
