// workers list, status.
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/format.h"
#include "common/base/format.h"
#include "common/base/status.h"

namespace ppft::ctl {

Result WorkersList(Context& context) {
  v1::ListWorkersResponse response;
  PPFT_RETURN_IF_ERROR(context.Call(context.cluster(), &v1::ClusterService::StubInterface::ListWorkers, v1::ListWorkersRequest(), &response));
  if (context.PrintMessage(response)) return kOk;
  std::vector<std::vector<std::string>> rows = {{"NAME", "STATE", "DEVICES", "HARDWARE", "LEASED TO", "ADDRESS", "VERSION", "HEARTBEAT"}};
  for (const v1::Worker& worker : response.workers()) {
    if (context.format == Format::kName) context.out() << worker.name() << "\n";
    std::vector<std::string> devices, leases, hardware;
    for (const v1::Device& device : worker.devices()) {
      devices.push_back(device.id());
      const std::string details = HardwareText(device);
      std::string text = absl::StrCat(device.name(), device.name().empty() || details.empty() ? "" : ", ", details);
      if (hardware.empty() || hardware.back() != text) hardware.push_back(std::move(text));
    }
    for (const v1::Lease& lease : worker.leases()) leases.push_back(absl::StrCat(lease.device(), "=", lease.job_id()));
    rows.push_back({worker.name(), worker.state(), devices.empty() ? "-" : absl::StrJoin(devices, ","),
                    hardware.empty() || hardware[0].empty() ? "-" : absl::StrJoin(hardware, " + "), leases.empty() ? "-" : absl::StrJoin(leases, ","),
                    worker.address(), worker.version(), absl::StrCat(ShortDuration(ToDuration(worker.heartbeat_age())), " ago")});
  }
  if (context.format == Format::kTable) {
    if (response.workers().empty()) {
      context.err() << "no workers: start one with ppft-worker --coordinator " << context.server << " --devices cpu:1\n";
    } else {
      context.out() << FormatTable(rows);
      for (const v1::Worker& worker : response.workers()) {
        for (const std::string& problem : worker.problems()) context.out() << worker.name() << ": " << Printable(problem) << "\n";
      }
    }
  }
  return kOk;
}

Result Status(Context& context) {
  v1::GetStatusResponse response;
  PPFT_RETURN_IF_ERROR(context.Call(context.cluster(), &v1::ClusterService::StubInterface::GetStatus, v1::GetStatusRequest(), &response));
  if (context.PrintMessage(response)) return kOk;
  std::map<std::string, int> sorted(response.jobs().begin(), response.jobs().end());
  std::vector<std::string> jobs;
  for (const auto& [state, count] : sorted) {
    if (count > 0) jobs.push_back(absl::StrCat(count, " ", state));
  }
  context.out() << FormatTable({{"coordinator", absl::StrCat(context.server, ", version ", response.version())},
                                {"since", FormatTime(response.start_time(), absl::LocalTimeZone())},
                                {"workers", absl::StrCat(response.num_workers())},
                                {"devices", absl::StrCat(response.num_devices(), ", ", response.num_devices_free(), " free")},
                                {"jobs", jobs.empty() ? "none" : absl::StrJoin(jobs, ", ")},
                                {"data", absl::StrCat(response.data_dir(), ", ", FormatBytes(response.data_bytes_free()), " free")}});
  return kOk;
}

}  // namespace ppft::ctl
