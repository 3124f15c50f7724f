// What the command line refuses: one line with what would be accepted, exit status 2.

// RUN: not sagellm opt %s -p no-such-pass 2>&1 | filecheck %s --check-prefix PASS
// PASS: sagellm opt: error: unknown pass 'no-such-pass'; accepted: cleanup, comm-compute-overlap, kernel-fusion, kv-eviction-placement, pack-weights, prefix-dedup, shard, speculative-branching

// RUN: not sagellm opt %s -p "cleanup{speed=9}" 2>&1 | filecheck %s --check-prefix OPTION
// OPTION: sagellm opt: error: unknown option of pass cleanup 'speed'; accepted: none

// RUN: not sagellm opt %s -p "cleanup{" 2>&1 | filecheck %s --check-prefix PIPELINE
// PIPELINE: sagellm opt: error: pipeline 'cleanup{': {{.*}}; accepted: name,name{option=value},...

// RUN: not sagellm opt %s --target abacus 2>&1 | filecheck %s --check-prefix TARGET
// TARGET: sagellm opt: error: unknown target 'abacus'; accepted: {{.*}}cpu

// RUN: not sagellm opt %s -p cleanup --without nn.teleport 2>&1 | filecheck %s --check-prefix KERNEL
// KERNEL: sagellm opt: error: unknown kernel of cpu 'nn.teleport'; accepted: {{.*}}nn.attention

// RUN: not sagellm opt %s -p cleanup --layout float32 2>&1 | filecheck %s --check-prefix LAYOUT
// LAYOUT: sagellm opt: error: --layout is 'float32'; accepted: DTYPE=NAME, or DTYPE= for none

// RUN: not sagellm opt %s -p cleanup --layout int4=blocked 2>&1 | filecheck %s --check-prefix DTYPE
// DTYPE: sagellm opt: error: unknown dtype for cpu 'int4'; accepted: {{.*}}float32

// RUN: not sagellm opt %s --load-pass no_such_module:Pass 2>&1 | filecheck %s --check-prefix MODULE
// MODULE: sagellm opt: error: --load-pass no_such_module:Pass: No module named 'no_such_module'

// RUN: not sagellm opt %s --load-pass sagellm.passes.cleanup:Sweep 2>&1 | filecheck %s --check-prefix CLASS
// CLASS: sagellm opt: error: --load-pass sagellm.passes.cleanup:Sweep: 'Sweep' is no pass; accepted: Cleanup

// RUN: not sagellm opt %S/no_such_file.mlir 2>&1 | filecheck %s --check-prefix FILE
// FILE: sagellm opt: error: cannot read '{{.*}}no_such_file.mlir': No such file or directory

// RUN: not sagellm opt %s --emit music 2>&1 | filecheck %s --check-prefix EMIT
// EMIT: sagellm opt: error: Invalid value for '--emit': 'music' is not one of 'ir', 'code'.

// RUN: not sagellm opt %s --no-such-option 2>&1 | filecheck %s --check-prefix FLAG
// FLAG: sagellm opt: error: No such option{{.*}}--no-such-option

// RUN: not sagellm optimise %s 2>&1 | filecheck %s --check-prefix COMMAND
// COMMAND: sagellm: error: unknown command 'optimise'; accepted: {{.*}}opt

builtin.module {
}
