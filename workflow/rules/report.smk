# Tables, figures and the report: from results to answers, without touching a run again.


localrules:
    tables,
    figures,
    database,
    write_report,
    artifact,
    pack_artifact,


rule tables:
    input:
        script=stage_script("make_tables"),
        outcomes=outcomes,
        evaluations=evaluations,
        predictions="results/{study}/predictions.json",
        hardware=hardware_descriptions,
        published=published_numbers,
        inferences=inferences,
    output:
        runs=report(
            "results/{study}/tables/runs.csv",
            caption="../report/runs.rst",
            category="Tables",
            labels={"what": "every run"},
        ),
        points="results/{study}/tables/points.csv",
        comparisons=report(
            "results/{study}/tables/comparisons.csv",
            caption="../report/comparisons.rst",
            category="Tables",
            labels={"what": "each point against its baseline"},
        ),
        experiments="results/{study}/tables/experiments.csv",
        gates="results/{study}/tables/gates.csv",
        losses="results/{study}/tables/losses.csv",
        ranks="results/{study}/tables/ranks.csv",
        scaling="results/{study}/tables/scaling.csv",
        environment="results/{study}/tables/environment.csv",
        inference="results/{study}/tables/inference.csv",
        published="results/{study}/tables/published.csv",
        published_tables="results/{study}/tables/published_tables.csv",
        points_latex="results/{study}/tables/points.tex",
        comparisons_latex="results/{study}/tables/comparisons.tex",
        # A copy of results/calibration.csv, which is the record of all studies and therefore no output of any.
        calibration="results/{study}/calibration.csv",
        plan="results/{study}/plan.json",
    log:
        "logs/{study}/tables.log",
    conda:
        "../../envs/report.yaml"
    params:
        source=source_digest("make_tables"),
        plan=tables_plan,
    shell:
        "python {input.script} --plan {params.plan:q} --results results/{wildcards.study} >{log} 2>&1"


rule figures:
    input:
        script=stage_script("make_figures"),
        tables=rules.tables.output,
        facts=facts,
    output:
        report(
            directory("results/{study}/figures"),
            patterns=["{experiment}-{kind}.svg"],
            caption="../report/figures.rst",
            category="Figures",
            subcategory="{experiment}",
            labels={"experiment": "{experiment}", "figure": "{kind}"},
        ),
    log:
        "logs/{study}/figures.log",
    conda:
        "../../envs/report.yaml"
    threads: 4
    params:
        source=source_digest("make_figures"),
        plan=tables_plan,
    shell:
        "python {input.script} --plan {params.plan:q} --results results/{wildcards.study}"
        " --figures {output} --processes {threads} >{log} 2>&1"


rule database:
    input:
        script=stage_script("make_database"),
        tables=rules.tables.output,
        steps=steps,
        evaluations=evaluations,
        facts=facts,
    output:
        "results/{study}/study.sqlite",
    log:
        "logs/{study}/database.log",
    conda:
        "../../envs/report.yaml"
    params:
        source=source_digest("make_database"),
        plan=tables_plan,
    shell:
        "python {input.script} --plan {params.plan:q} --results results/{wildcards.study}"
        " --output {output} >{log} 2>&1"


rule write_report:
    input:
        script=stage_script("make_report"),
        tables=rules.tables.output,
        figures=rules.figures.output,
    output:
        report(
            "results/{study}/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"what": "the report"},
        ),
    log:
        "logs/{study}/report.log",
    conda:
        "../../envs/report.yaml"
    params:
        source=source_digest("make_report"),
        plan=report_plan,
        study_file=study_file,
    shell:
        "python {input.script} --plan {params.plan:q} --results results/{wildcards.study}"
        " --logs logs/{wildcards.study} --study-file {params.study_file:q} --output {output} >{log} 2>&1"


rule artifact:
    input:
        artifact_file,


rule pack_artifact:
    input:
        script=stage_script("make_artifact"),
        results=study_results,
    output:
        "results/{study}/artifact.tar.gz",
    log:
        "logs/{study}/artifact.log",
    conda:
        "../../envs/report.yaml"
    params:
        source=source_digest("make_artifact"),
        plan=report_plan,
        study_file=study_file,
    # The results are packed as they are: what they were made from is in Snakemake's records, which go along.
    shell:
        "python {input.script} --plan {params.plan:q} --results results/{wildcards.study}"
        " --study-file {params.study_file:q} --output {output} >{log} 2>&1"
