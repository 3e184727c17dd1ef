/* llama.cpp as an anchor that stays loaded: one command per line on stdin, one answer per line on stdout, so that a
 * benchmark can alternate with it within seconds. Timed like llama-bench: llama_decode and llama_synchronize only.
 *
 *   llama_anchor <backends> <model> <threads> <context> <sequences> <flash attention 0|1>
 *
 * LLAMA_ANCHOR_CPU names the one CPU variant to load (`ivybridge` for libggml-cpu-ivybridge.so); without it, ggml chooses.
 *
 *   tg N            microseconds to decode N tokens one by one in one sequence
 *   pp N            microseconds to take a prompt of N tokens
 *   par S N         microseconds to decode N tokens in each of S sequences, one batch per token
 *   depth D N       as tg, after D tokens of context (those are not timed)
 *   ppl W ID...     sum of -ln p over the second half of a window of W tokens, and how many were summed
 *   greedy N ID...  the N tokens of highest probability after the prompt
 *   rss             resident memory in KiB
 */
#include <llama.h>
#include <ggml-backend.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct llama_context *ctx;
static int n_vocab;
static int n_batch;

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void quiet(enum ggml_log_level level, const char *text, void *user) {
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void fail(const char *what) {
    fprintf(stderr, "llama_anchor: %s\n", what);
    exit(1);
}

static void clear(void) { llama_memory_clear(llama_get_memory(ctx), false); }

/* Decodes `n` tokens of sequence 0 in batches; `all` asks for the logits of each. */
static void decode(llama_token *tokens, int n) {
    for (int at = 0; at < n; at += n_batch) {
        int take = n - at < n_batch ? n - at : n_batch;
        if (llama_decode(ctx, llama_batch_get_one(tokens + at, take)) != 0) fail("llama_decode");
    }
    llama_synchronize(ctx);
}

static llama_token *random_tokens(int n) {
    llama_token *tokens = malloc(sizeof *tokens * (n > 0 ? n : 1));
    for (int i = 0; i < n; i++) tokens[i] = rand() % n_vocab;
    return tokens;
}

static double generate(int depth, int n) {
    clear();
    llama_token *prompt = random_tokens(depth);
    if (depth > 0) decode(prompt, depth);
    free(prompt);
    double start = now_us();
    for (int i = 0; i < n; i++) {
        llama_token token = rand() % n_vocab;
        decode(&token, 1);
    }
    return now_us() - start;
}

static double prompt(int n) {
    clear();
    llama_token *tokens = random_tokens(n);
    double start = now_us();
    decode(tokens, n);
    double spent = now_us() - start;
    free(tokens);
    return spent;
}

static double parallel(int sequences, int n) {
    clear();
    struct llama_batch batch = llama_batch_init(sequences, 0, 1);
    double start = now_us();
    for (int i = 0; i < n; i++) {
        batch.n_tokens = sequences;
        for (int s = 0; s < sequences; s++) {
            batch.token[s] = rand() % n_vocab;
            batch.pos[s] = i;
            batch.n_seq_id[s] = 1;
            batch.seq_id[s][0] = s;
            batch.logits[s] = 1;
        }
        if (llama_decode(ctx, batch) != 0) fail("llama_decode of a batch");
        llama_synchronize(ctx);
    }
    double spent = now_us() - start;
    llama_batch_free(batch);
    return spent;
}

static int read_ids(char *text, llama_token **out) {
    int n = 0, room = 1024;
    llama_token *ids = malloc(sizeof *ids * room);
    for (char *word = strtok(text, " \n"); word; word = strtok(NULL, " \n")) {
        if (n == room) ids = realloc(ids, sizeof *ids * (room *= 2));
        ids[n++] = atoi(word);
    }
    *out = ids;
    return n;
}

/* The windowing of llama-perplexity: the window starts without context, its second half is scored. */
static void perplexity(llama_token *ids, int n) {
    clear();
    struct llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch.token[i] = ids[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    if (llama_decode(ctx, batch) != 0) fail("llama_decode of a window");
    double sum = 0;
    int count = 0;
    for (int i = n / 2; i < n - 1; i++, count++) {
        const float *logits = llama_get_logits_ith(ctx, i);
        double peak = logits[0], total = 0;
        for (int v = 1; v < n_vocab; v++) peak = logits[v] > peak ? logits[v] : peak;
        for (int v = 0; v < n_vocab; v++) total += exp(logits[v] - peak);
        sum -= logits[ids[i + 1]] - peak - log(total);
    }
    llama_batch_free(batch);
    printf("%.9f %d\n", sum, count);
}

static void greedy(llama_token *ids, int n, int count) {
    clear();
    decode(ids, n);
    for (int i = 0; i < count; i++) {
        const float *logits = llama_get_logits_ith(ctx, -1);
        llama_token best = 0;
        for (int v = 1; v < n_vocab; v++) {
            if (logits[v] > logits[best]) best = v;
        }
        printf(i ? " %d" : "%d", best);
        decode(&best, 1);
    }
    printf("\n");
}

static void resident(void) {
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    if (!status) fail("/proc/self/status");
    while (fgets(line, sizeof line, status)) {
        if (strncmp(line, "VmRSS:", 6) == 0) printf("%d\n", atoi(line + 6));
    }
    fclose(status);
}

static void load_backends(const char *folder) {
    const char *variant = getenv("LLAMA_ANCHOR_CPU");
    if (!variant) {
        ggml_backend_load_all_from_path(folder);
        return;
    }
    char path[4096];
    snprintf(path, sizeof path, "%s/libggml-cpu-%s.so", folder, variant);
    if (!ggml_backend_load(path)) fail("cannot load the variant that LLAMA_ANCHOR_CPU names");
}

int main(int argc, char **argv) {
    if (argc != 7) fail("arguments: backends model threads context sequences flash-attention");
    llama_log_set(quiet, NULL);
    load_backends(argv[1]);
    struct llama_model *model = llama_model_load_from_file(argv[2], llama_model_default_params());
    if (!model) fail("cannot load the model");
    struct llama_context_params params = llama_context_default_params();
    params.n_threads = params.n_threads_batch = atoi(argv[3]);
    params.n_seq_max = atoi(argv[5]);
    params.n_ctx = atoi(argv[4]) * params.n_seq_max;
    params.n_batch = n_batch = 2048;
    params.n_ubatch = 512;
    params.flash_attn_type = atoi(argv[6]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    ctx = llama_init_from_model(model, params);
    if (!ctx) fail("cannot make a context");
    n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");

    char *line = NULL;
    size_t room = 0;
    while (getline(&line, &room, stdin) > 0) {
        int a = 0, b = 0, at = 0;
        llama_token *ids;
        if (sscanf(line, "tg %d", &a) == 1) {
            printf("%.1f\n", generate(0, a));
        } else if (sscanf(line, "depth %d %d", &a, &b) == 2) {
            printf("%.1f\n", generate(a, b));
        } else if (sscanf(line, "pp %d", &a) == 1) {
            printf("%.1f\n", prompt(a));
        } else if (sscanf(line, "par %d %d", &a, &b) == 2) {
            printf("%.1f\n", parallel(a, b));
        } else if (sscanf(line, "ppl %d%n", &a, &at) == 1) {
            int n = read_ids(line + at, &ids);
            if (n != a || n < 2) fail("ppl: the number of ids is not the window's");
            perplexity(ids, n);
            free(ids);
        } else if (sscanf(line, "greedy %d%n", &a, &at) == 1) {
            int n = read_ids(line + at, &ids);
            if (n < 1) fail("greedy: no prompt");
            greedy(ids, n, a);
            free(ids);
        } else if (strncmp(line, "rss", 3) == 0) {
            resident();
        } else {
            fail("unknown command");
        }
    }
    free(line);
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
