#include "clients/ppctl/cli.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <functional>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "clients/ppctl/commands.h"
#include "clients/ppctl/completion.h"
#include "clients/ppctl/config.h"
#include "clients/ppctl/format.h"
#include "common/base/status.h"
#include "common/spec/suggest.h"

#ifndef PPFT_VERSION
#error "PPFT_VERSION comes from the build"
#endif

namespace ppft::ctl {
namespace {

// Parses into options that live as long as this object, then runs what was chosen.
class Cli {
 public:
  explicit Cli(Terminal* terminal) : context_(terminal) {
    app_.name("ppctl");
    app_.description("ppctl: submit, watch and fetch fine-tuning jobs of a ppft coordinator.");
    app_.require_subcommand(1);
    app_.fallthrough();
    app_.failure_message(CLI::FailureMessage::simple);
    app_.footer(
        "Examples:\n"
        "  ppctl models register llama /models/llama-3.2-1b\n"
        "  ppctl submit job.yaml --follow\n"
        "  ppctl fetch job-k3x9a2b7 -o final_model\n\n"
        "Exit codes: 0 ok, 1 failure, 2 wrong usage or input, 3 not found, 4 not allowed, 5 coordinator unavailable, 6 deadline, 7 precondition or conflict, "
        "8 the job failed, 130 interrupted.\n"
        "Data goes to standard output, messages and progress to standard error.");
    app_.add_option("--server", context_.server, "Coordinator, HOST:PORT")->envname("PPCTL_SERVER")->capture_default_str();
    app_.add_option("--tls-ca", context_.tls.ca, "PEM authority of the coordinator's certificate")->envname("PPCTL_TLS_CA");
    app_.add_option("--tls-cert", context_.tls.certificate, "PEM certificate to show to it")->envname("PPCTL_TLS_CERT");
    app_.add_option("--tls-key", context_.tls.key, "PEM key of that certificate")->envname("PPCTL_TLS_KEY");
    app_.add_option("--token-file", context_.token_file, "File with a bearer token, for a proxy before the coordinator; the coordinator itself reads none")
        ->envname("PPCTL_TOKEN_FILE");
    app_.add_option("--context", context_.context_name, "Settings of that name in the config file (ppctl config list); default: the current ones")
        ->envname("PPCTL_CONTEXT");
    app_.add_option("--timeout", timeout_, "How long to wait for the coordinator: 30s, 5m")->envname("PPCTL_TIMEOUT")->capture_default_str();
    app_.add_option("-o,--output", output_, "table, json, yaml or name")->envname("PPCTL_OUTPUT")->capture_default_str();
    JobFileCommands();
    JobCommands();
    DataCommands();
    ModelCommands();
    OtherCommands();
  }

  int Run(std::vector<std::string> arguments) {
    std::reverse(arguments.begin(), arguments.end());
    try {
      app_.parse(std::move(arguments));
    } catch (const CLI::Success& help) {
      return app_.exit(help, context_.out(), context_.err());
    } catch (const CLI::ParseError& error) {
      context_.err() << "ppctl: " << Complaint(error) << "\nSee ppctl --help, or ppctl COMMAND --help.\n";
      return kUsage;
    }
    const Result result = Execute();
    if (result.ok()) return *result;
    context_.err() << "ppctl: " << Printable(result.status().message()) << "\n";
    return ExitCodeOf(result.status());
  }

 private:
  Result Execute() {
    if (needs_server_) PPFT_RETURN_IF_ERROR(ReadConfig());
    PPFT_RETURN_IF_ERROR(ReadGlobals());
    if (needs_server_) PPFT_RETURN_IF_ERROR(context_.Connect());
    return run_();
  }

  // What neither a flag nor the environment says.
  absl::Status ReadConfig() {
    PPFT_ASSIGN_OR_RETURN(const Config config, LoadConfig(ConfigPath()));
    PPFT_ASSIGN_OR_RETURN(const Settings settings, ChooseContext(config, context_.context_name));
    if (context_.context_name.empty()) context_.context_name = config.current;
    const std::pair<const char*, std::string*> targets[] = {{"server", &context_.server},
                                                            {"tls-ca", &context_.tls.ca},
                                                            {"tls-cert", &context_.tls.certificate},
                                                            {"tls-key", &context_.tls.key},
                                                            {"token-file", &context_.token_file},
                                                            {"timeout", &timeout_},
                                                            {"output", &output_}};
    for (const auto& [flag, target] : targets) {
      const auto setting = settings.find(absl::StrReplaceAll(flag, {{"-", "_"}}));
      if (setting != settings.end() && app_.get_option(absl::StrCat("--", flag))->count() == 0) *target = setting->second;
    }
    return absl::OkStatus();
  }

  absl::Status ReadGlobals() {
    static const auto* const formats =
        new std::map<std::string, Format>{{"table", Format::kTable}, {"json", Format::kJson}, {"yaml", Format::kYaml}, {"name", Format::kName}};
    const auto format = formats->find(output_);
    if (format == formats->end())
      return absl::InvalidArgumentError(absl::StrCat("--output ", output_, " is not known", spec::UseOneOf(output_, {"table", "json", "yaml", "name"})));
    context_.format = format->second;
    context_.timeout_given = app_.get_option("--timeout")->count() > 0;
    if (!absl::ParseDuration(timeout_, &context_.timeout) || context_.timeout <= absl::ZeroDuration() || context_.timeout > absl::Hours(24)) {
      return absl::InvalidArgumentError(absl::StrCat("--timeout ", timeout_, " is not a duration: use 30s, 5m or 2h"));
    }
    return absl::OkStatus();
  }

  // What the parser complains about, in our words where a command's name is the trouble.
  std::string Complaint(const CLI::ParseError& error) const {
    const auto chosen = app_.get_subcommands();
    const CLI::App* app = chosen.empty() ? &app_ : chosen[0];
    std::vector<std::string> names;
    for (const CLI::App* command : app->get_subcommands([](const CLI::App*) { return true; })) names.push_back(command->get_name());
    const bool wants_command = dynamic_cast<const CLI::RequiredError*>(&error) != nullptr && !names.empty() && app->get_subcommands().empty();
    if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) return Unexpected(error.what());
    if (!wants_command) return error.what();
    for (const std::string& word : app_.remaining(true)) {
      if (word.empty() || word[0] == '-') continue;
      const std::string nearest = spec::Nearest(word, names);
      return absl::StrCat("\"", word, "\" is not a command", nearest.empty() ? "" : absl::StrCat("; did you mean ", nearest, "?"));
    }
    return absl::StrCat("a command is missing: ", absl::StrJoin(names, ", "));
  }

  // An argument that nobody takes, with the option that was perhaps meant.
  std::string Unexpected(const std::string& complaint) const {
    std::vector<std::string> options;
    for (const CLI::App* app = &app_; app != nullptr; app = app->get_subcommands().empty() ? nullptr : app->get_subcommands()[0]) {
      for (const CLI::Option* option : app->get_options()) {
        for (const std::string& name : option->get_lnames()) options.push_back(absl::StrCat("--", name));
      }
    }
    for (const std::string& word : app_.remaining(true)) {
      if (!absl::StartsWith(word, "--")) continue;
      const std::string written = word.substr(0, word.find('=')), nearest = spec::NearestName(written, options);
      if (!nearest.empty()) return absl::StrCat(written, " is not an option here; did you mean ", nearest, "?");
    }
    return complaint;
  }

  CLI::App* Add(CLI::App* parent, const std::string& name, const std::string& description, std::function<Result()> run, const std::string& examples = "") {
    CLI::App* command = parent->add_subcommand(name, description);
    command->fallthrough();
    command->callback([this, run = std::move(run)] { run_ = run; });
    command->footer(examples.empty() ? "" : absl::StrCat("Examples:\n", examples));  // not the parent's
    return command;
  }

  CLI::App* Group(const std::string& name, const std::string& description) {
    CLI::App* group = app_.add_subcommand(name, description);
    group->fallthrough();
    group->require_subcommand(1);
    group->footer("");
    return group;
  }

  void JobFileOptionsOf(CLI::App* command) {
    command->add_option("FILE", job_file_.file, "job.yaml; - reads standard input")->required();
    command->add_option("--set", job_file_.overrides, "Replace one value: KEY=VALUE, such as training.max_steps=100; null removes")->allow_extra_args(false);
  }

  void JobFileCommands() {
    CLI::App* submit = Add(
        &app_, "submit", "Check a job file, upload its data and submit it; prints the job's id", [this] { return Submit(context_, job_file_); },
        "  ppctl submit job.yaml --follow\n"
        "  ppctl submit job.yaml --set training.max_steps=100 --set adapter.r=8\n"
        "  ppctl submit job.yaml --dry-run            # the resolved job, nothing stored\n"
        "  id=$(ppctl submit job.yaml -o name --request-id nightly-2026-11-23)");
    JobFileOptionsOf(submit);
    submit->add_flag("--follow", job_file_.follow, "Stay until the job ends: exit 0 if it succeeded, 8 if not");
    submit->add_flag("--dry-run", job_file_.dry_run, "Only check, and print the resolved job");
    submit->add_option("--request-id", job_file_.request_id, "The same id with the same job is submitted once, however often it is sent");
    JobFileOptionsOf(Add(
        &app_, "validate", "Check a job file and its data without storing anything", [this] { return Validate(context_, job_file_); },
        "  ppctl validate job.yaml"));
    JobFileOptionsOf(Add(
        &app_, "plan", "Show stages, bytes, schedule and whether the job fits", [this] { return ctl::Plan(context_, job_file_); },
        "  ppctl plan job.yaml\n  ppctl plan job.yaml --set parallel.pipeline_parallel_size=4"));
  }

  CLI::App* AddForJob(const std::string& name, const std::string& description, std::function<Result()> run, const std::string& examples) {
    CLI::App* command = Add(&app_, name, description, std::move(run), examples);
    command->add_option("JOB", job_, "Id, or a name that only one job has")->required();
    return command;
  }

  void JobCommands() {
    CLI::App* list = Add(
        &app_, "list", "List jobs, newest first", [this] { return ListJobs(context_, list_); },
        "  ppctl list\n  ppctl list --state running --state queued\n  ppctl list --label team=nlp -o name");
    list->add_option("--state", list_.states, "Only jobs in this state (repeat for more)")->allow_extra_args(false);
    list->add_option("--label", list_.labels, "Only jobs with this label, KEY=VALUE (repeat for more)")->allow_extra_args(false);
    AddForJob(
        "get", "Show one job", [this] { return ctl::GetJob(context_, job_); },
        "  ppctl get job-k3x9a2b7\n  ppctl get job-k3x9a2b7 -o yaml     # with the resolved job.yaml under spec");
    AddForJob(
        "watch", "Follow a job to its end: exit 0 if it succeeded, 8 if not", [this] { return ctl::WatchJob(context_, job_); },
        "  ppctl watch job-k3x9a2b7       # Ctrl-C stops watching, not the job");
    AddForJob(
        "events", "Show what happened to a job", [this] { return Events(context_, job_, follow_); },
        "  ppctl events job-k3x9a2b7\n  ppctl events -f job-k3x9a2b7 -o json")
        ->add_flag("-f,--follow", follow_, "Go on until the job ends");
    AddForJob(
        "logs", "Show a job's log lines", [this] { return Logs(context_, job_, follow_); }, "  ppctl logs job-k3x9a2b7\n  ppctl logs -f job-k3x9a2b7")
        ->add_flag("-f,--follow", follow_, "Go on until the job ends");
    AddForJob(
        "metrics", "Show a job's history: loss, learning rate, evaluation by step",
        [this] {
          metrics_.job = job_;
          return Metrics(context_, metrics_);
        },
        "  ppctl metrics job-k3x9a2b7\n  ppctl metrics job-k3x9a2b7 --plot\n  ppctl metrics job-k3x9a2b7 -o json")
        ->add_flag("--plot", metrics_.plot, "Draw loss and eval_loss instead of the table");
    CLI::App* trace = AddForJob(
        "trace", "Record the next steps of a job as a Chrome trace: what each rank does when",
        [this] {
          trace_.job = job_;
          return ctl::Trace(context_, trace_);
        },
        "  ppctl trace job-k3x9a2b7 --steps 3\n  ppctl trace job-k3x9a2b7 --steps 1 -o - | gzip > trace.json.gz");
    trace->add_option("--steps", trace_.num_steps, "Optimizer steps")->check(CLI::Range(1, 100))->capture_default_str();
    trace->add_option("-o,--out", trace_.file, "File to write; - is standard output")->capture_default_str();
    AddForJob(
        "cancel", "Stop a job and free its devices", [this] { return ctl::CancelJob(context_, job_); }, "  ppctl cancel job-k3x9a2b7");
    AddForJob(
        "checkpoints", "List a job's checkpoints", [this] { return Checkpoints(context_, job_); }, "  ppctl checkpoints job-k3x9a2b7");
    CLI::App* fetch = Add(
        &app_, "fetch", "Download a job's result; resumes, and checks the SHA-256 of each file", [this] { return Fetch(context_, fetch_); },
        "  ppctl fetch job-k3x9a2b7\n  ppctl fetch job-k3x9a2b7 -o merged_model --type merged\n  ppctl fetch job-k3x9a2b7 -o at200 --checkpoint step:200");
    fetch->add_option("JOB", fetch_.job, "Id, or a name that only one job has")->required();
    fetch->add_option("-o,--out", fetch_.folder, "Folder to make")->capture_default_str();
    fetch->add_option("--checkpoint", fetch_.checkpoint, "best, latest or step:N instead of the final model");
    fetch->add_option("--type", fetch_.type, "adapter or merged")->capture_default_str();
    fetch->add_flag("--force", fetch_.force, "Replace an earlier fetch in that folder");
  }

  void DataCommands() {
    CLI::App* data = Group("data", "Datasets");
    Add(
        data, "upload", "Upload data files; prints their ids", [this] { return DataUpload(context_, files_); }, "  ppctl data upload train.jsonl")
        ->add_option("FILE", files_, "JSONL files")
        ->required();
    Add(
        data, "list", "List datasets", [this] { return DataList(context_); }, "  ppctl data list");
    CLI::App* show = Add(
        data, "show", "Show rows as training sees them: supervised tokens in colour, or in [[ ]]", [this] { return DataShow(context_, show_); },
        "  ppctl data show job.yaml -n 3\n  ppctl data show train.jsonl --base-model llama --type prompt_completion");
    show->add_option("TARGET", show_.target, "A job file, a dataset id or a data file")->required();
    show->add_option("-n,--rows", show_.num_rows, "Rows from the start")->check(CLI::Range(1, 100))->capture_default_str();
    show->add_option("--dataset", show_.dataset, "Which of the job's datasets, from 0")->capture_default_str();
    show->add_option("--base-model", show_.base_model, "Whose tokenizer, unless TARGET is a job file");
    show->add_option("--type", show_.type, "summarization, prompt_completion or completion, unless TARGET is a job file");
    show->add_option("--set", show_.overrides, "Replace one value of the job: KEY=VALUE")->allow_extra_args(false);
  }

  void ModelCommands() {
    CLI::App* models = Group("models", "Base models");
    CLI::App* add = Add(
        models, "register", "Register a folder under one of the coordinator's model roots", [this] { return ModelsRegister(context_, model_, folder_); },
        "  ppctl models register llama-3.2-1b /models/llama-3.2-1b");
    add->add_option("NAME", model_, "The name that jobs use")->required();
    add->add_option("PATH", folder_, "Hugging Face folder on the coordinator's machine")->required();
    CLI::App* upload = Add(
        models, "upload", "Upload a local Hugging Face folder and register it", [this] { return ModelsUpload(context_, model_, folder_); },
        "  ppctl models upload tiny ./tiny-llama");
    upload->add_option("NAME", model_, "The name that jobs use")->required();
    upload->add_option("DIR", folder_, "Hugging Face folder on this machine")->required();
    Add(
        models, "list", "List models", [this] { return ModelsList(context_); }, "  ppctl models list");
  }

  void OtherCommands() {
    Add(
        Group("workers", "Workers"), "list", "List workers, their devices and leases", [this] { return WorkersList(context_); }, "  ppctl workers list");
    Add(
        &app_, "status", "Show the coordinator's state", [this] { return ctl::Status(context_); }, "  ppctl status");
    CLI::App* doctor = Add(
        &app_, "doctor", "Look for trouble between here and the last device: each check ok, warn or fail, and what to do",
        [this] { return ctl::Doctor(context_, doctor_); }, "  ppctl doctor\n  ppctl doctor --contents     # reads every byte of models and datasets");
    doctor->add_flag("--contents", doctor_.contents, "Also read every byte of the models and datasets; takes long");
    CLI::App* config = Group("config", "Named coordinators and how to talk to them, in ~/.config/ppctl/config.yaml");
    config->preparse_callback([this](size_t) { needs_server_ = false; });
    Add(
        config, "list", "List the contexts", [this] { return ConfigList(context_); }, "  ppctl config list");
    CLI::App* set = Add(
        config, "set", "Make or change a context: server, tls_ca, tls_cert, tls_key, token_file, timeout, output",
        [this] { return ConfigSet(context_, name_, settings_); },
        "  ppctl config set lab server=lab:7070 tls_ca=ca.pem tls_cert=me.pem tls_key=me.key\n  ppctl config set lab timeout=        # back to the default");
    set->add_option("NAME", name_, "Of the context")->required();
    set->add_option("SETTINGS", settings_, "KEY=VALUE; without a value a setting is removed")->required();
    Add(
        config, "use", "Make a context the current one", [this] { return ConfigUse(context_, name_); }, "  ppctl config use lab")
        ->add_option("NAME", name_, "Of the context")
        ->required();
    Add(
        config, "delete", "Delete a context", [this] { return ConfigDelete(context_, name_); }, "  ppctl config delete lab")
        ->add_option("NAME", name_, "Of the context")
        ->required();
    Add(
        &app_, "completion", "Print a completion script",
        [this]() -> Result {
          PPFT_ASSIGN_OR_RETURN(const std::string script, CompletionScript(app_, shell_));
          context_.out() << script;
          return kOk;
        },
        "  source <(ppctl completion bash)\n  ppctl completion fish > ~/.config/fish/completions/ppctl.fish")
        ->add_option("SHELL", shell_, "bash, zsh or fish")
        ->required()
        ->each([this](const std::string&) { needs_server_ = false; });
    CLI::App* version = Add(&app_, "version", "Print the version", [this]() -> Result {
      context_.out() << (context_.format == Format::kJson   ? "{\"version\": \"" PPFT_VERSION "\"}"
                         : context_.format == Format::kYaml ? "version: \"" PPFT_VERSION "\""
                                                            : PPFT_VERSION)
                     << "\n";
      return kOk;
    });
    version->preparse_callback([this](size_t) { needs_server_ = false; });
  }

  CLI::App app_;
  Context context_;
  std::string timeout_ = "30s", output_ = "table";
  bool needs_server_ = true;
  std::function<Result()> run_;

  JobFileOptions job_file_;
  ListOptions list_;
  ShowOptions show_;
  FetchOptions fetch_;
  MetricsOptions metrics_;
  TraceOptions trace_;
  DoctorOptions doctor_{false, PPFT_VERSION};
  std::string job_, model_, folder_, shell_, name_;
  std::vector<std::string> files_, settings_;
  bool follow_ = false;
};

}  // namespace

int Run(const std::vector<std::string>& arguments, Terminal* terminal) { return Cli(terminal).Run(arguments); }

}  // namespace ppft::ctl
