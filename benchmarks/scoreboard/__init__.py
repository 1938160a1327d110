"""`make scoreboard`: fastops beside PyTorch, torch.compile, JAX, ONNX Runtime and OpenVINO, on whole networks.

Each provider runs in a process of its own (worker.py), with the same weights, inputs and threads. What it
computes is verified before it is timed. Then the providers take turns, round after round; whoever is not in turn is
stopped (SIGSTOP), so that no pool of threads spins beside another's work. A time is the median of all samples, with
their quartiles. A provider that is missing, wrong or crashes is reported as that, and the others go on.

    make scoreboard
    python -m fastops.benchmarks.scoreboard --models resnet50 --providers eager replace openvino --only inference
"""
