"""verl without a GPU: a platform, both engines on it, and a rollout by transformers.

For tests, by VERL_USE_EXTERNAL_MODULES and VERL_PLATFORM=cpu. Ray counts as many GPUs as `ray.init` is told.
"""

import types
from collections import Counter
from functools import partial

import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry

from r2m import devices
from r2m.integrations.remote import RewardModel


class Device(types.ModuleType):
    """What verl asks of torch.cuda: nothing is allocated, nothing has to be waited for."""

    def mem_get_info(self, *_):
        return 0, 0

    def current_device(self):
        return torch.device("cpu")

    def get_device_name(self, *_):
        return "CPU"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: 0


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    device_name = vendor_name = "cpu"
    device_module = Device("cpu_as_torch_cuda")

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return torch.device("cpu")

    def communication_backend_name(self):
        return "gloo"

    def is_ipc_supported(self):
        return False

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def empty_cache(self):
        pass

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    manual_seed = manual_seed_all

    def set_allocator_settings(self, settings):
        pass


# After the platform: these modules ask for it as they are imported.
from verl.utils import distributed

# verl wants one backend for the CPU and one for the device.
distributed.initialize_global_process_group_ray = partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.rollout import base, replica

EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")(
    transformer_impl.FSDPEngineWithLMHead
)
# There is no accelerator that memory could be pinned for.
policy = transformer_impl.CPUOffloadPolicy
transformer_impl.CPUOffloadPolicy = lambda **_: policy(pin_memory=False)


class Float32RewardModel(RewardModel):
    """In a process of its own, whatever products its CPU has: its rewards are compared with those of float32."""

    def __init__(self, *args):
        devices.native_bfloat16 = lambda device: False
        super().__init__(*args)


class Server:
    """One replica: a model that samples a response at a time, always the same ones of the same weights' age."""

    def __init__(self, path, response_length):
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.eos, self.length = AutoTokenizer.from_pretrained(path).eos_token_id, response_length
        self.steps, self.calls = 0, Counter()

    async def generate(self, prompt_ids, sampling_params, **_):
        temperature, ids = sampling_params["temperature"], torch.tensor([prompt_ids])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        call = (self.steps, *prompt_ids)
        self.calls[call] += 1
        torch.manual_seed(hash((*call, self.calls[call])))
        output = self.model.generate(
            ids, **sampling, max_new_tokens=self.length, eos_token_id=self.eos, pad_token_id=self.eos
        )
        return replica.TokenOutput(
            token_ids=output[0, len(prompt_ids) :].tolist(), extra_fields={"global_steps": self.steps}
        )

    async def update(self, weights, steps):
        self.model.load_state_dict(weights, strict=False)  # tied weights come once
        self.steps = steps

    async def nothing(self, **_):
        pass

    wake_up = sleep = clear_kv_cache = abort_all_requests = resume_generation = nothing


class Replica(replica.RolloutReplica):
    async def launch_servers(self):
        self._server_address = f"transformers_{self.replica_rank}"
        self._server_handle = (
            ray.remote(Server)
            .options(name=self._server_address, num_cpus=0)
            .remote(self.model_config.path, self.config.response_length)
        )
        self.servers = [self._server_handle]


class Adapter(base.BaseRollout):
    """In the policy's process: hands its weights over."""

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, global_steps=None, **_):
        server = ray.get_actor(f"transformers_{torch.distributed.get_rank()}")
        await server.update.remote({name: weight.cpu() for name, weight in weights}, global_steps)


base._ROLLOUT_REGISTRY["transformers", "async"] = f"{__name__}.Adapter"
replica.RolloutReplicaRegistry.register("transformers", lambda: Replica)
