// What this host is, for people who look for the cause of trouble.
#pragma once

#include <string>

#include "ppft/v1/cluster.pb.h"

namespace ppft::agent {

// Cores and memory that processes here may use.
int UsableCores();
int64_t UsableMemoryBytes();

// All but what the trainer knows (torch, nccl). `address`: the worker's; its interface is looked for. What is not known stays empty.
v1::HostFacts GatherHostFacts(const std::string& address);

// "host-1a2b3c": this host's name and what tells the folder from others on hosts of that name, as two network namespaces of one machine are. The same
// after every start. At most 63 characters.
std::string NameOfFolder(const std::string& hostname, const std::string& work_directory);

// Free bytes for ordinary use on the disk of `folder`; 0 if that cannot be told.
int64_t DiskFreeBytes(const std::string& folder);

}  // namespace ppft::agent
