# What each run needs and whether it fits: at a dry run before the jobs, in a study for comparison with what was measured.
from tunemap.planner.dry_run import print_table, wants_table

# A process of its own predicts, for torch stays out of this one; what it computed serves later dry runs.
if wants_table(sys.argv[1:], os.environ):
    print_table(STUDY_FILE, workflow.config_settings.config or {}, CHECKOUT / "src")


rule predict:
    input:
        script=stage_script("predict_runs"),
        models=trained_models,
        tokens=trained_tokens,
    output:
        "results/{study}/predictions.json",
    log:
        "logs/{study}/predict.log",
    # Beside the evaluations, of which there are many; after the last of them the tables would wait for it alone.
    priority: 1
    conda:
        "../../envs/train.yaml"
    params:
        source=source_digest("predict_runs"),
        plan=tables_plan,
        data_root=data_root,
    shell:
        "python {input.script} --plan {params.plan:q} --data-root {params.data_root:q}"
        " --output {output} >{log} 2>&1"
