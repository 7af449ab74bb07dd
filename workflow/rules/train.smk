# Each run is trained, then evaluated. A run that fails is a result: it ends with an outcome file all the same.


rule train:
    input:
        script=stage_script("train_run"),
        model=run_model,
        dataset=run_dataset,
        tokens=run_tokens,
    output:
        outcome="results/{study}/runs/{run}/outcome.json",
        steps="results/{study}/runs/{run}/steps.csv",
        weights=directory("results/{study}/runs/{run}/weights"),
    log:
        "logs/{study}/train/{run}.log",
    # Timed runs take turns: what waits for its turn goes first, all else uses the cores that a run on GPUs leaves.
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
        runtime=run_runtime,
        attempts_left=attempts_left,
        timed_run=1,
    params:
        source=source_digest("train_run"),
        spec=training_spec,
        device=device,
    # The work folder is no output: it must survive a kill, and Snakemake removes the outputs of a killed job.
    # The ceilings are no input: measuring one (tunemap ceiling) is no reason to train again.
    # A shell would die of the signals that ask the launcher for a checkpoint, so it makes way for it (exec).
    shell:
        "exec python {input.script} --spec {params.spec:q} --device {params.device}"
        " --model {input.model} --dataset {input.dataset} --tokens {input.tokens}"
        " --work results/{wildcards.study}/unfinished/{wildcards.run}"
        " --ceilings results/shared/ceilings.json --attempts-left {resources.attempts_left}"
        " --weights {output.weights} --steps {output.steps} --outcome {output.outcome} >{log} 2>&1"


rule evaluate:
    input:
        script=stage_script("evaluate_run"),
        model=run_model,
        tokens=run_tokens,
        outcome="results/{study}/runs/{run}/outcome.json",
        weights="results/{study}/runs/{run}/weights",
    output:
        evaluation="results/{study}/evaluations/{run}/evaluation.json",
        predictions="results/{study}/evaluations/{run}/predictions.jsonl",
    log:
        "logs/{study}/evaluate/{run}.log",
    conda:
        "../../envs/train.yaml"
    threads: evaluation_threads
    resources:
        gpu=evaluation_gpus,
        mem_mb=evaluation_mem_mb,
        runtime=evaluation_runtime,
        attempts_left=attempts_left,
    params:
        source=source_digest("evaluate_run"),
        spec=evaluation_spec,
        device=device,
    shell:
        "HF_HUB_OFFLINE=1 python {input.script} --spec {params.spec:q} --device {params.device}"
        " --model {input.model} --tokens {input.tokens}"
        " --outcome {input.outcome} --weights {input.weights}"
        " --work results/{wildcards.study}/unfinished/{wildcards.run} --attempts-left {resources.attempts_left}"
        " --evaluation {output.evaluation} --predictions {output.predictions} >{log} 2>&1"
