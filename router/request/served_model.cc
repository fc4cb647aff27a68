#include "router/request/served_model.h"

#include <utility>

#include "common/base/file.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"
#include "common/rpc/cluster_client.h"

namespace tandem::router {

absl::StatusOr<ServedModel> ServedModel::Load(const std::string& model_dir,
                                              const std::string& name) {
  TANDEM_RETURN_IF_ERROR(CheckModelDir("--model", model_dir));
  ServedModel model;
  model.name = name.empty() ? DefaultModelName(model_dir) : name;
  TANDEM_ASSIGN_OR_RETURN(model.config, ModelConfig::Load(model_dir));
  TANDEM_ASSIGN_OR_RETURN(model.defaults, LoadGenerationConfig(model_dir));
  model.eos_token_ids = model.defaults.eos_token_ids.empty() ? model.config.eos_token_ids
                                                             : model.defaults.eos_token_ids;
  const std::string tokenizer_json = model_dir + "/tokenizer.json";
  if (FileExists(tokenizer_json)) {
    TANDEM_ASSIGN_OR_RETURN(model.tokenizer, Tokenizer::Load(tokenizer_json));
    model.tokenizer_digest = TokenizerDigest(model_dir);
    TANDEM_ASSIGN_OR_RETURN(model.chat_template, ChatTemplate::Load(model_dir));
    if (model.tokenizer->vocab_size() > model.config.vocab_size) {
      return InvalidArgument(
          "{}: the tokenizer has ids up to {}, the model's vocab_size (config.json) is {}",
          tokenizer_json, model.tokenizer->vocab_size() - 1, model.config.vocab_size);
    }
  }
  return model;
}

}  // namespace tandem::router
