# What a run costs when it is used: for the experiments that ask for it.


rule measure_inference:
    input:
        script=stage_script("measure_inference"),
        model=run_model,
        tokens=run_tokens,
        outcome="results/{study}/runs/{run}/outcome.json",
        weights="results/{study}/runs/{run}/weights",
    output:
        "results/{study}/inference/{run}.json",
    log:
        "logs/{study}/inference/{run}.log",
    conda:
        "../../envs/train.yaml"
    threads: inference_threads
    resources:
        gpu=evaluation_gpus,
        mem_mb=evaluation_mem_mb,
        runtime=inference_runtime,
        timed_run=1,
    params:
        source=source_digest("measure_inference"),
        spec=training_spec,
        device=device,
    shell:
        "HF_HUB_OFFLINE=1 python {input.script} --spec {params.spec:q} --device {params.device}"
        " --model {input.model} --tokens {input.tokens}"
        " --outcome {input.outcome} --weights {input.weights} --output {output} >{log} 2>&1"
