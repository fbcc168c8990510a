"""Private and undocumented parts of DeepSpeed that the engine is built on."""

import inspect
import os
from types import SimpleNamespace

from contract_checks import names_in, parameters, takes
from torch import nn

LIBRARY = "deepspeed"
SEEN = ("0.19.0", "0.19.8")


def test_parts_are_set_by_partition_layers():
    """`PipelineModule._partition_layers(method)`, in engine/pipeline_module.py: called while the module is built, after
    `_topo` and `global_rank` are known, and overridden to cut where the plan says."""
    from deepspeed.runtime.pipe.module import PipelineModule

    assert parameters(PipelineModule._partition_layers) == ["method"]
    assert {"_partition_layers", "_topo", "global_rank", "_build"} <= names_in(PipelineModule.__init__)


def test_bounds_of_a_stage():
    """`PipelineModule._set_bounds(start, stop)`, in engine/pipeline_module.py: says which layers the rank builds."""
    from deepspeed.runtime.pipe.module import PipelineModule

    module = SimpleNamespace()
    PipelineModule._set_bounds(module, start=2, stop=5)
    assert set(vars(module).values()) == {2, 5}
    assert set(vars(module)) <= names_in(PipelineModule._build)


def test_layers_are_built_by_their_spec():
    """`LayerSpec.build()`, in engine/pipeline_module.py: called for the rank's own layers alone, without arguments;
    overridden to read the layer from the checkpoint."""
    from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule

    assert parameters(LayerSpec.__init__)[0] == "typename"
    assert isinstance(LayerSpec(nn.Identity).build(), nn.Identity)
    assert {"LayerSpec", "build"} <= names_in(PipelineModule._build)


def test_module_takes_topology():
    """`PipelineModule(layers, topology, partition_method)`, in engine/pipeline_module.py: a topology of our own, and a
    partition method that it hands to `_partition_layers` unread."""
    from deepspeed.runtime.pipe.module import PipelineModule

    takes(PipelineModule.__init__, "layers", "topology", "partition_method")


def test_topology_reads_its_mapping():
    """`PipeDataParallelTopology.mapping`, in engine/pipeline_module.py: {coordinate: rank}, rewritten after
    construction to put stages on ranks in the plan's order; all questions are answered from it."""
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    topology = PipeDataParallelTopology(num_pp=3, num_dp=1)
    topology.mapping = {coordinate: (2, 0, 1)[coordinate.pipe] for coordinate in topology.mapping}
    assert [topology.get_coord(rank).pipe for rank in range(3)] == [1, 2, 0]
    assert topology.get_rank(pipe=0, data=0) == 2
    assert topology.get_dim("pipe") == 3


def test_engine_runs_instructions_from_its_map():
    """`PipelineEngine._INSTRUCTION_MAP`, in engine/pipeline_engine.py: {instruction class: method}; `_exec_schedule`
    calls the method of each step's instructions with their keyword arguments."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import PipeInstruction, PipeSchedule

    class Note(PipeInstruction):
        pass

    class Schedule(PipeSchedule):
        def steps(self):
            yield [Note(batch=1), Note(batch=2)]
            yield [Note(batch=3)]

        def num_pipe_buffers(self):
            return 0

    engine = SimpleNamespace(noted=[], _reserve_pipe_buffers=lambda count: None)
    engine._INSTRUCTION_MAP = {Note: lambda engine, batch: engine.noted.append(batch)}
    assert set(map(type, PipelineEngine._INSTRUCTION_MAP)) == {type}
    assert parameters(PipelineEngine._exec_schedule) == ["pipe_schedule"]
    PipelineEngine._exec_schedule(engine, Schedule(1, 2, 0))
    assert engine.noted == [1, 2, 3]


def test_schedules():
    """`PipeSchedule(micro_batches, stages, stage_id)`, in engine/schedules.py: iterates over `steps()`, knows whether
    the stage is first or last, and asks for buffers by a method that has a default."""
    from deepspeed.runtime.pipe.schedule import PipeSchedule

    assert parameters(PipeSchedule.__init__) == ["micro_batches", "stages", "stage_id"]

    class Schedule(PipeSchedule):
        def steps(self):
            yield []

    first, last = Schedule(4, 2, 0), Schedule(4, 2, 1)
    assert (first.is_first_stage, first.is_last_stage) == (True, False)
    assert (last.is_first_stage, last.is_last_stage) == (False, True)
    assert list(first) == [[]]
    assert first.num_pipe_buffers() >= 0


def test_instructions_keep_their_arguments():
    """`PipeInstruction(**kwargs)`, in engine/schedules.py: kept as attributes and in `kwargs`."""
    from deepspeed.runtime.pipe.schedule import PipeInstruction

    instruction = PipeInstruction(batch=7)
    assert instruction.batch == 7
    assert instruction.kwargs == {"batch": 7}


def test_weights_are_sent_by_broadcast_model():
    """`PipelineEngine._broadcast_model()`, in engine/pipeline_engine.py: what makes all ranks' weights equal when the
    engine is built; overridden to do nothing."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    assert parameters(PipelineEngine._broadcast_model) == []
    assert "_broadcast_model" in names_in(PipelineEngine._configure_distributed_model)


def test_config_from_a_dictionary_and_a_grid():
    """`DeepSpeedConfig(config, mpu)`, in engine/pipeline_engine.py: made of a dictionary and the pipeline's grid, then
    handed to the engine as `config_class`."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.pipe.engine import PipelineEngine

    grid = SimpleNamespace(get_data_parallel_world_size=lambda: 1)
    config = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}, grid)
    assert config.train_batch_size == 1
    arguments = inspect.signature(PipelineEngine.__mro__[1].__init__).parameters
    assert {"args", "model", "mpu", "config", "config_class"} <= set(arguments)


def test_place_of_an_engine():
    """`PipelineEngine.stage_id`, in engine/pipeline_engine.py: with `num_stages`, `is_first_stage()` and
    `is_last_stage()` the engine's place, set while it is built."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    assert {"stage_id", "num_stages"} <= names_in(PipelineEngine.__init__)
    engine = SimpleNamespace(stage_id=0, num_stages=2)
    assert PipelineEngine.is_first_stage(engine)
    assert not PipelineEngine.is_last_stage(engine)


def test_operators_marked_incompatible_are_not_built(monkeypatch):
    """`deepspeed.ops.__compatible_ops__`, in engine/rank_context.py: {operator: whether it can be built}; where it says
    False for the shared-memory all-reduce, none is compiled at `init_distributed`."""
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    compatible = deepspeed.ops.__compatible_ops__
    assert compatible is deepspeed.ops.__compatible_ops__
    assert set(map(type, compatible.values())) <= {bool}
    for name in compatible:
        monkeypatch.setitem(compatible, name, False)
    assert build_shm_op() is None


def test_log_names():
    """`getLogger("DeepSpeed")`, in engine/pipeline_engine.py: the logger that `deepspeed.utils` speaks through."""
    import deepspeed

    assert deepspeed.utils.logger.name == "DeepSpeed"


def test_what_the_launcher_says_of_a_dead_rank():
    """`exits with return code =`, in launch/process_monitor.py: the launcher's line on a host when a rank has
    died, with the rank's code, by which `run` knows of it before the launcher ends."""
    from deepspeed.launcher import launch

    from ds_llmpq.launch.process_monitor import _RANK_DIED

    line = "{cmd} exits with return code = {last_return_code}"
    assert line in inspect.getsource(launch)
    assert _RANK_DIED.search(line.format(cmd="serve", last_return_code=-9).encode())[1] == b"-9"


def test_variables_of_a_rank():
    """`LOCAL_SIZE`, in launch/environment.py: beside torch's RANK, WORLD_SIZE and LOCAL_RANK, how many ranks the
    per-host launcher has started."""
    from deepspeed.launcher import launch

    source = inspect.getsource(launch)
    assert all(f'"{name}"' in source for name in ("LOCAL_SIZE", "LOCAL_RANK", "RANK", "WORLD_SIZE"))


def test_options_of_the_launcher(tmp_path):
    """`deepspeed.launcher.runner`, in launch/launcher.py: started as a module, with these options."""
    from deepspeed.launcher.runner import parse_args

    from ds_llmpq.launch.launcher import Launch, build_command

    (tmp_path / "hostfile").write_text("a slots=1\n")
    for env in ({}, {"MASTER_ADDR": "10.0.0.1"}):
        for hosts in (("localhost",), ("a",), ("a", "b")):
            launch = Launch(tmp_path / "hostfile", "a:0", hosts, "cpu", env, tmp_path, master_port=2345)
            _, module, name, *options = build_command(launch, ["plan=p.json"])
            assert (module, name) == ("-m", "deepspeed.launcher.runner")
            found = parse_args(options)
            assert found.module
            assert (found.include, found.master_port, found.log_level) == ("a:0", 2345, "warning")
            assert (found.user_script, found.user_args) == ("ds_llmpq.commands.serve", ["plan=p.json"])


def test_file_of_variables():
    """`DS_ENV_FILE`, in launch/launcher.py: names the file whose NAME=VALUE lines are exported on every host; an
    absolute path is taken as it is."""
    from deepspeed.launcher import runner

    assert os.path.join("/home", "/absolute/file") == "/absolute/file"
    source = inspect.getsource(runner)
    assert 'DEEPSPEED_ENVIRONMENT_NAME = os.getenv("DS_ENV_FILE"' in source
    assert "os.path.join(environ_path, DEEPSPEED_ENVIRONMENT_NAME)" in source
