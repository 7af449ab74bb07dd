# Models and data, prepared once and shared by all studies.


# Here, where the workflow was started: on many clusters only such hosts reach the network.
localrules:
    prepare_model,
    prepare_dataset,


rule prepare_model:
    input:
        script=stage_script("prepare_model"),
        source=model_sources,
    output:
        directory("results/shared/models/{model}"),
    log:
        "logs/prepare_model/{model}.log",
    conda:
        "../../envs/train.yaml"
    # A tiny model is pretrained by two.
    threads: 2
    params:
        source=source_digest("prepare_model"),
        spec=model_spec,
        data_root=data_root,
    shell:
        "python {input.script} --spec {params.spec:q} --data-root {params.data_root:q}"
        " --destination {output} >{log} 2>&1"


rule prepare_dataset:
    input:
        script=stage_script("prepare_dataset"),
        source=dataset_sources,
    output:
        directory("results/shared/datasets/{dataset}"),
    log:
        "logs/prepare_dataset/{dataset}.log",
    conda:
        "../../envs/train.yaml"
    params:
        source=source_digest("prepare_dataset"),
        spec=dataset_spec,
        data_root=data_root,
    shell:
        "python {input.script} --spec {params.spec:q} --data-root {params.data_root:q}"
        " --destination {output} >{log} 2>&1"


rule tokenize_dataset:
    input:
        script=stage_script("tokenize_dataset"),
        model=tokens_model,
        dataset=tokens_dataset,
    output:
        directory("results/shared/tokens/{tokens}"),
    log:
        "logs/tokenize_dataset/{tokens}.log",
    conda:
        "../../envs/train.yaml"
    params:
        source=source_digest("tokenize_dataset"),
        spec=tokens_spec,
    shell:
        "HF_HUB_OFFLINE=1 python {input.script} --spec {params.spec:q} --model {input.model} --dataset {input.dataset}"
        " --destination {output} >{log} 2>&1"
