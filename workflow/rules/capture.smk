# What the device did: a few steps of a run, repeated under a profiler, and the facts read from its traces.


rule capture:
    input:
        script=stage_script("capture_run"),
        model=run_model,
        tokens=run_tokens,
        outcome="results/{study}/runs/{run}/outcome.json",
    output:
        directory("results/{study}/captures/{run}"),
    log:
        "logs/{study}/capture/{run}.log",
    priority: 2
    conda:
        "../../envs/train.yaml"
    threads: run_threads
    resources:
        gpu=run_gpus,
        gres=run_gres,
        nodes=run_nodes,
        tasks=run_tasks,
        mpi=run_launched_by,
        mem_mb=run_mem_mb,
        timed_run=1,
    params:
        source=source_digest("capture_run"),
        spec=training_spec,
        device=device,
        backend=capture_backend,
    shell:
        "python {input.script} --spec {params.spec:q} --device {params.device} --backend {params.backend}"
        " --model {input.model} --tokens {input.tokens} --outcome {input.outcome}"
        " --folder {output} >{log} 2>&1"


# Opt-in: one process under Nsight Compute, which runs every kernel of a step several times over.
rule measure_kernels:
    input:
        script=stage_script("capture_run"),
        model=run_model,
        tokens=run_tokens,
        outcome="results/{study}/runs/{run}/outcome.json",
    output:
        directory("results/{study}/rooflines/{run}"),
    log:
        "logs/{study}/measure_kernels/{run}.log",
    conda:
        "../../envs/train.yaml"
    threads: run_threads
    resources:
        gpu=run_gpus,
        mem_mb=run_mem_mb,
        timed_run=1,
    params:
        source=source_digest("capture_run"),
        spec=training_spec,
        device=device,
    shell:
        "python {input.script} --spec {params.spec:q} --device {params.device} --backend ncu"
        " --model {input.model} --tokens {input.tokens} --outcome {input.outcome}"
        " --folder {output} >{log} 2>&1"


rule extract:
    input:
        script=stage_script("extract_facts"),
        capture="results/{study}/captures/{run}",
        roofline=roofline_capture,
    output:
        directory("results/{study}/facts/{run}"),
    log:
        "logs/{study}/extract/{run}.log",
    priority: 1  # as predict
    conda:
        "../../envs/train.yaml"
    params:
        source=source_digest("extract_facts"),
        roofline=roofline_option,
    shell:
        "python {input.script} --capture {input.capture} {params.roofline:q} --facts {output} >{log} 2>&1"
