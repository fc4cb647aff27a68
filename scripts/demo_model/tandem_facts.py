"""What the demo model knows: Tandem itself, small talk, and what lies outside its skills.

Each topic is (answer, patterns); a pattern's alternatives "(a|b)" expand to many wordings. The wordings of one
topic are split by the rank of their hash, so every topic has both training and held-out ones.
"""

import hashlib
import random
import re

from demo_model.words import HELDOUT, TRAIN, split_of


def _expand(pattern: str) -> list[str]:
    """All wordings of a pattern: "(What|Who) are you( now|)?" gives four."""
    choice = re.search(r"\(([^()]*)\)", pattern)
    if not choice:
        text = re.sub(r"\s+([?.!,])", r"\1", " ".join(pattern.split()))
        return [text[0].upper() + text[1:]]
    before, after = pattern[: choice.start()], pattern[choice.end():]
    return [text for option in choice[1].split("|") for text in _expand(before + option + after)]


def _concept(noun: str, *more: str) -> list[str]:
    """Wordings that ask for a thing named by `noun`, which carries its article ("a KV block")."""
    bare = noun.split(" ", 1)[1] if noun.startswith(("a ", "an ", "the ")) else noun
    return [
        f"(What is|What's|What exactly is|Explain|Please explain|Describe|Please describe|Tell me about|Can you explain|"
        f"Could you explain|Can you describe|What about|Explain to me|Say something about) {noun}?",
        f"(Tell me|Explain|Can you tell me|Could you tell me|Do you know|I want to know|I would like to know|Please explain|"
        f"Can you explain|Please tell me) what {noun} is.",
        f"What (is meant by|do you mean by|is|does it mean to say|do people mean by|does Tandem mean by) {bare}?",
        f"What does (the term|the word|) {bare} mean?", f"(Define|Explain|Please explain) (the term|the word|) {bare}.",
        f"{bare}, what (is that|does that mean|is it)?", f"(Tell me|Please tell me) (more|something|a little) about {noun}.",
        f"What (should|must) I know about {noun}?", *more,
    ]


def _part(noun: str, *more: str) -> list[str]:
    """Wordings for a part of the system that does something."""
    return _concept(
        noun, f"What (does|can|will) {noun} do?", f"What is {noun} (for|good for|needed for)?",
        f"What is the (job|role|purpose|task|point|use|work) of {noun}?", f"Why (do I need|is there|do we need|have) {noun}?",
        f"(Can you tell me|Tell me|Please tell me|Explain|Do you know|Please explain) what {noun} does.",
        f"(How does {noun} work|Tell me how {noun} works|Explain how {noun} works)?", f"What happens in {noun}?", *more,
    )


def _how(task: str, *more: str) -> list[str]:
    """Wordings that ask how to do `task` ("start a cluster")."""
    return [
        f"(How do I|How can I|How to|How would I|How does one|How should I|How do we|How can one) {task}?",
        f"(Tell me|Show me|Explain|Please tell me|Please explain) how to {task}.",
        f"(What|Which command) (must I type|do I type|do I use|do I need|can I use) to {task}?",
        f"What is the (command|way|best way) to {task}?", f"I (want to|would like to|need to) {task}.",
        f"(Can|Could) you (show|tell) me how to {task}?", f"What do I do to {task}?", *more,
    ]


TANDEM = [
    ("Tandem serves Qwen2-family models from a cluster of gRPC services, with prefill and decode in separate workers.",
     _part("Tandem", "What is this Tandem thing?", "What kind of software is Tandem?", "What is Tandem good at?",
           "Give me a summary of Tandem.")),
    ("A prefill worker computes the KV blocks of a prompt in chunks and ships them to a decode worker.",
     _part("a prefill worker", "What do prefill workers do?", "What are prefill workers?", "Why are there prefill workers?")),
    ("A decode worker receives the KV blocks of a prompt and streams the answer under continuous batching.",
     _part("a decode worker", "What do decode workers do?", "What are decode workers?", "Why are there decode workers?")),
    ("The router checks and tokenises every request and picks a prefill and a decode worker for it.",
     _part("the router", "What is a router in Tandem?", "What does Tandem's router do?")),
    ("A KV block holds the keys and values of some tokens, 16 by default, for all layers.",
     _concept("a KV block", "What are KV blocks?", "What is stored in a KV block?", "What is in a KV block?",
              "What does a KV block hold?")),
    ("The KV cache holds the keys and values of tokens that were already computed.",
     _part("the KV cache", "What is a KV cache?", "What is stored in the KV cache?")),
    ("The prefix cache keeps the KV blocks of earlier prompts, so a shared beginning is not computed again.",
     _part("the prefix cache", "What is prefix caching?", "What is a prefix cache?", "Why is there a prefix cache?")),
    ("TTFT is the time to first token: how long you wait until the answer begins.",
     _concept("TTFT", "What does TTFT stand for?", "What does TTFT measure?", "What is the time to first token?",
              "Explain the time to first token.")),
    ("ITL is the inter-token latency: the gap between two tokens of an answer.",
     _concept("ITL", "What does ITL stand for?", "What does ITL measure?", "What is the inter-token latency?",
              "Explain inter-token latency.")),
    ("A transport moves KV blocks between workers: tcp, shm, cuda_ipc or nccl.",
     _part("a transport", "What are transports?", "Which transports are there?", "Which transports does Tandem have?",
           "What does the transport do?", "Name the transports of Tandem.")),
    ("Run tandem up --model DIR --prefill 1 --decode 1 and wait for the ready line.",
     _how("(start|launch|bring up|create) (a cluster|the cluster|my cluster|a local cluster|Tandem)", "How do I start Tandem?", "How do I bring up a cluster?", "How do I launch a cluster?",
          "How is a cluster started?", "How can I run a local cluster?", "How do I start a local cluster?",
          "What does tandem up do?")),
    ("Press Ctrl-C: SIGINT or SIGTERM stops the cluster cleanly.",
     _how("(stop|shut down|end|quit|terminate) (a cluster|the cluster|my cluster|Tandem)", "How do I stop Tandem?", "How do I shut down a cluster?", "How do I shut the cluster down?",
          "How do I end a cluster?", "How is a cluster stopped?", "How can I stop the cluster?")),
    ("Run scripts/demo: it builds Tandem, starts a cluster and holds a two-turn chat.",
     _how("(run|see|try|start|watch) (the demo|a demo|your demo|the Tandem demo)", "How do I see the demo?", "How is the demo started?", "Where is the demo?", "What does the demo do?",
          "How do I try the demo?", "Is there a demo?", "How do I start the demo?")),
    ("Run scripts/test: it does the set-up and runs the whole test suite.",
     _how("(run|start|execute) (the tests|all tests|the test suite|the unit tests)", "How do I test Tandem?", "How do I run the test suite?", "How are the tests run?",
          "Where are the tests started?", "How do I start the tests?", "How can I run all tests?")),
    ("Prefill is the first phase: the prompt is computed and its KV blocks are filled.",
     _concept("prefill", "What is the prefill phase?", "What happens during prefill?", "What does prefill do?",
              "Explain the prefill phase.", "What happens in the prefill phase?")),
    ("Decode is the second phase: the answer is made one token at a time.",
     _concept("decode", "What is the decode phase?", "What happens during decode?", "What does decode do?",
              "Explain the decode phase.", "What happens in the decode phase?")),
    ("So that a long prompt does not disturb running answers: the gaps between tokens stay steady.",
     [
      "Why (are|do you keep|does Tandem keep) prefill and decode (separate|apart|in separate workers)?",
      "Why (split|separate|disaggregate) prefill (and|from) decode?",
      "Why (does Tandem|do you) (split|separate|disaggregate) prefill (and|from) decode?",
      "(What is|What is the point of|What is the benefit of|What is the use of|What is the idea of|Why|Explain|Describe|Tell me about|Why use) disaggregation?",
      "Why is (disaggregation|a separate prefill worker|separate prefill) (useful|good|needed|better)?",
      "What is (gained|won) by (separate workers|disaggregation|separate prefill)?",
      "Why (not|do you not|does Tandem not) run prefill and decode (together|in one worker|in the same worker)?",
      "Why do prefill and decode run in (separate|different) (workers|processes)?",
      "What is the (point|benefit|use) of separate (prefill and decode|workers)?",
     ]),
    ("Continuous batching lets sequences join and leave the running batch at every step.",
     _part("continuous batching", "What does continuous batching do?", "Why continuous batching?")),
    ("Chunked prefill computes a long prompt in pieces, so that short prompts do not wait behind it.",
     _part("chunked prefill", "Why is prefill chunked?", "Why are prompts computed in chunks?", "Why chunked prefill?")),
    ("A block lease owns KV blocks and gives them back when it is destroyed.",
     _part("a block lease", "What are block leases?", "What is a BlockLease?", "What does a BlockLease do?")),
    ("Quarantine keeps the blocks of an unfinished transfer unused until no late write can reach them.",
     _part("quarantine", "Why are blocks put into quarantine?", "What is a quarantined block?", "When is a block in quarantine?")),
    ("Each KV block carries a digest that is checked when it is sealed, so damaged data is never served.",
     _part("a block digest", "What is the digest of a block?", "What are digests for?", "Why do blocks have a digest?",
           "What does the digest do?")),
    ("A unified worker does prefill and decode itself; it is the baseline to compare with.",
     _part("a unified worker", "What is the unified role?", "What does --role=unified do?", "What are unified workers?")),
    ("If only a small part of a prompt is uncached, the decode worker prefills it itself.",
     _concept("local prefill", "When is prefill done locally?", "What does --local-prefill-max-tokens do?",
              "When does the decode worker prefill by itself?", "How does local prefill work?", "Why local prefill?")),
    ("It estimates the cost of each pair of workers in milliseconds and takes the cheapest.",
     [
      "How does the router (choose|pick|select|decide on) (a worker|the worker|workers|a pair of workers|a route)?",
      "How (is|are) (a worker|the worker|workers|the route|a pair of workers) (chosen|picked|selected) (by the router|)?",
      "How does (routing|the routing|the routing policy) work?",
      "(What is|Explain|Describe|Tell me about) (the routing policy|the routing|the routing rule|the policy of the router)?",
      "How does the router (choose|decide)?",
      "(Which|What) worker does the router (pick|choose|take|select)?",
      "How does the router decide where (a request|my request|a prompt) goes?",
      "(Explain|Tell me) how (routing works|the router chooses|the router decides|workers are chosen).",
     ]),
    ("The first token is sampled on the prefill worker.",
     [
      "(Where|On which worker|By whom) is the first token (sampled|made|computed|produced|chosen)?",
      "(Who|Which worker|Which process) (samples|makes|computes|produces|chooses) the (first token|first token of an answer)?",
      "Where does the first token come from?",
      "Tell me (who|which worker) (samples|makes|computes|produces) the first token.",
      "Tell me where the first token is (sampled|made|computed).",
      "Does the prefill worker (sample|make) the first token?",
     ]),
    ("Clients call tandem.v1.Inference on the router over gRPC: Generate or Chat.",
     [
      "How (do|can|should) (clients|I|programs|we) (talk to|call|use|speak to|reach) (Tandem|the API)?",
      "(Which|What) (API|public API|interface|protocol) does Tandem (have|use|offer|speak)?",
      "(What is|Describe|Explain|Tell me about) (the API|the public API|the API of Tandem|the interface of Tandem|the client API)?",
      "(Which|What) (protocol|service|API) do clients (use|call)?",
      "How (does|can|should) a client (send a request|call the router|talk to the router|connect)?",
      "How do I send (a request|requests|a prompt)?",
      "Does Tandem (use|speak) gRPC?",
      "(Which|What) calls does the API (have|offer)?",
     ]),
    ("Tandem serves the Qwen2 family: Qwen1.5, Qwen2 and Qwen2.5.",
     [
      "(Which|What|What kind of) models (does|can|will) Tandem (serve|run|support|handle|load)?",
      "(Which|What|What kind of) models (are supported|can I use|can I run|can I serve|may I use|can be served|work)?",
      "(Can|Does|Will) Tandem (run|serve|support|handle) (Qwen2|Qwen2.5|Qwen1.5|the Qwen2 family|Qwen models)?",
      "(Which|What) model (family|families) (is|are) supported?",
      "Tell me (which|what) models (are supported|I can use|Tandem serves).",
      "(Is|Are) (Qwen2|Qwen2.5|Qwen models) supported?",
     ]),
    ("Tandem is written in C++20.",
     [
      "(Which|What) (language|programming language) is Tandem (written|made|programmed|implemented) in?",
      "In (which|what) (language|programming language) is Tandem (written|made|programmed|implemented)?",
      "Is Tandem (written in|made in|programmed in) (C++|Python|Rust|Java|Go)?",
      "What is Tandem (written|programmed|implemented) in?",
      "(Which|What) (language|programming language) (does Tandem use|is used for Tandem)?",
      "Is Tandem a (Python|C++|Rust) program?",
      "Tell me (which|what) language Tandem is written in.",
     ]),
    ("No, Tandem also runs whole on a plain CPU.",
     [
      "(Do I need|Must I have|Does Tandem need|Do we need|Do you need|Does it need) a (GPU|graphics card)?",
      "Is a (GPU|graphics card) (required|needed|necessary)?",
      "(Can|Does|Will) (Tandem|it) (run|work) (without a GPU|on a CPU|on my CPU|on a plain CPU|without a graphics card|with no GPU)?",
      "Can I (use|run|try) (Tandem|it|the demo) (without a GPU|on a CPU|on my CPU|without a graphics card|with no GPU)?",
     ]),
    ("Run tandem status to see the workers of a cluster.",
     _how("(see the status|see the workers|list the workers|check the cluster|see the state of the cluster|show all workers|check the workers)", "How do I see the workers?", "What does tandem status do?", "How do I list the workers?",
          "How can I see which workers are running?", "Which command lists the workers?", "How do I check the cluster?",
          "How do I see the state of the cluster?")),
    ("Run tandem chat for an interactive chat that streams its answers.",
     _how("(chat with a model|chat with the model|start a chat|open a chat|talk to the model|talk to a model)", "What does tandem chat do?", "How do I start a chat?", "How do I open a chat?",
          "Which command opens a chat?", "How can I chat?", "How do I chat?", "How do I talk to the model?")),
    ("Run tandem generate to complete one prompt from the command line.",
     _how("(complete a prompt|complete one prompt|generate text|generate from the command line|complete some text)", "What does tandem generate do?", "How do I generate text?", "How do I complete one prompt?",
          "Which command completes a prompt?", "How do I generate from the command line?", "How can I generate text?")),
    ("Run tandem inspect MODEL_DIR to see the parameters of a model and its KV bytes per token.",
     _how("(inspect a model|inspect a checkpoint|look at a checkpoint|see the parameters of a model|see the size of a model)", "What does tandem inspect do?", "How do I see the parameters of a model?",
          "How many KV bytes does a token take?", "Which command shows the parameters of a model?",
          "How do I look at a checkpoint?", "How do I inspect a checkpoint?")),
    ("Before the first token the request is retried elsewhere; after it the stream ends with a clear status.",
     [
      "What (happens|does Tandem do|will happen) (if|when) a (worker|prefill worker|decode worker) (dies|crashes|is lost|fails|is killed|goes away|breaks)?",
      "What if a (worker|prefill worker|decode worker) (dies|crashes|is lost|fails|is killed|goes away|breaks)?",
      "What happens to my request (if|when) a worker (dies|crashes|is lost|fails|is killed)?",
      "Can Tandem (survive|handle) (the loss of a worker|a lost worker|a crash of a worker|a dead worker)?",
      "A worker (died|crashed|was lost|failed|was killed), what now?",
      "How (are crashes|are lost workers|is a lost worker|is a crash|are failures) handled?",
      "How does Tandem handle (a lost worker|crashes|failures|a dead worker|a crash)?",
     ]),
    ("A drained worker finishes its requests and takes no new ones.",
     _how("(drain a worker|drain the worker|drain one worker|take a worker out of service)", "What does DrainWorker do?", "What is draining?", "What is a drained worker?",
          "What does draining a worker mean?", "What happens when a worker is drained?", "What does drain mean?",
          "Explain draining.")),
    ("Every process serves Prometheus metrics named tandem_* on /metrics.",
     [
      "Where (are|do I find|can I find|can I see|do I see) (the metrics|metrics|its metrics)?",
      "How (do|can) I (see|get|read|collect|find) (the metrics|metrics)?",
      "(Which|What) metrics (are there|does Tandem have|does Tandem export|can I see)?",
      "(Does Tandem|Do the workers) (have|export|serve) metrics?",
      "How (do|can) I (monitor|observe|watch) (Tandem|a cluster|the cluster|the workers)?",
      "Is there (a metrics endpoint|monitoring|a way to monitor Tandem)?",
      "Does Tandem (work with|support|speak) Prometheus?",
      "(Tell me about|Explain|Describe) the metrics.",
      "How are metrics (served|exported)?",
     ]),
    ("When the KV pool is full, the youngest sequence is preempted and resumed later with no token lost.",
     _concept("preemption", "What happens when the KV pool is full?", "When is a sequence preempted?",
              "Which sequence is preempted?", "What is a preempted sequence?", "Why are sequences preempted?",
              "What does it mean to preempt a sequence?", "How does preemption work?", "What if the KV pool is full?")),
    ("The router tokenises prompts and turns tokens back into text; workers see only tokens.",
     [
      "Where (is the tokenizer|does the tokenizer run|does tokenisation happen|does the text live|does text live)?",
      "(Where|In which process|By whom) (are prompts|is the prompt|is a prompt|is text) (tokenised|turned into tokens)?",
      "(Who|Which process) (tokenises|turns into tokens) (the prompt|prompts|a prompt|the text)?",
      "(Who|Which process) turns tokens (into text|back into text)?",
      "Do (workers|the workers) (see|handle|know) text?",
      "Where (is text turned into tokens|are tokens turned into text|is the text)?",
      "(Who|Which process) does (the tokenisation|tokenisation)?",
      "Do workers (tokenise|have a tokenizer)?",
     ]),
    ("The default block size is 16 tokens; 32, 64, 128 and 256 work too.",
     _concept("the block size", "How large is a block?", "How big is a KV block?", "How many tokens fit in a block?",
              "Which block sizes are there?", "What block sizes can I use?", "What is the default block size?",
              "What does --block-size do?", "How many tokens does a block hold?")),
    ("A worker joins by opening one long-lived Join stream to the router.",
     [
      "How (does a worker|do workers|can a worker|do new workers|does a new worker) (join|register|join the cluster|find the router|register with the router|connect to the router)?",
      "How does the router (find|know|learn about) (workers|its workers|the workers|new workers)?",
      "(How does|Explain how) (membership|cluster membership) (work|works)?",
      "How is a (worker|new worker) (registered|added|added to the cluster)?",
      "(What is|Explain|Describe) (the Join stream|a Join stream|cluster membership|membership)?",
      "How (do|can) I add (a worker|workers|another worker|more workers)?",
      "Tell me how workers (join|register).",
     ]),
    ("KV blocks are pushed layer by layer while the prompt is still being computed.",
     [
      "(When|How) are (KV blocks|the KV blocks|blocks|the blocks) (sent|shipped|transferred|pushed|moved|sent to the decode worker)?",
      "How do (KV blocks|the KV blocks|blocks|the blocks) (reach|get to|come to|arrive at) (the decode worker|decode)?",
      "(How does|When does) the (KV transfer|transfer of KV blocks|block transfer) (work|start|happen)?",
      "(Explain|Describe|What is|Tell me about) the (KV transfer|transfer of KV blocks|block transfer)?",
      "How (does|do) prefill (workers|) (send|ship|push) (KV blocks|the blocks|blocks)?",
     ]),
    ("A full cluster answers RESOURCE_EXHAUSTED at once, before any compute is spent.",
     [
      "What (happens|does Tandem do|will happen) (if|when) (the cluster is full|there is no room|all workers are full|there are too many requests|the cluster is overloaded|it is full)?",
      "What if (the cluster is full|there is no room|all workers are full|there are too many requests|the cluster is overloaded)?",
      "What does a full (cluster|worker) do?",
      "(What happens under|How does Tandem handle|What about|How do you handle) (overload|too many requests|too much load)?",
      "(What does|Why do I get|When do I get|Why did I get|What is|What means|Explain) RESOURCE_EXHAUSTED (mean|)?",
     ]),
]

SMALLTALK = [
    ("Hello! How can I help you?",
     ["(Hello|Hi|Hey|Good morning|Good evening|Good afternoon|Good day|Greetings|Hi there|Hello there|Hey there)"
      "( again|, assistant|, my friend|, Tandem|, nice to see you|, are you there| to you|)(!|.|)",
      "(Hello|Hi|Hey), (are you there|is anyone there|anybody there|are you awake)?"]),
    ("You are welcome!",
     ["(Great, |Nice, |Perfect, |Ok, |Cool, |Good, |Oh, |)(thank you|thanks|many thanks|thank you very much|thanks a lot|thank you so much)"
      "( for your help| for that| for this| for the answer|, that helps|, that is good|)(!|.)"]),
    ("Goodbye!",
     ["(Ok, |Thanks, |That is all, |Well, |)(bye|goodbye|bye bye|see you|see you later|good night|farewell|so long|see you soon|"
      "until next time|see you tomorrow|have a nice day)( for now|, assistant|, my friend|, Tandem|)(!|.)",
      "(Ok, |Sorry, |Well, |)I (have to|must|need to|will) (go|leave) (now|soon|) (.|!)"]),
    ("I am fine, thank you.",
     ["(Hi, |Hello, |Hey, |So, |And |)(how are you|how are you doing|how do you feel|how are you feeling|how do you do|how is it going|how are things|"
      "how is life|are you well|are you ok|are you fine|are you all right|how is your day|is all well)( today| now| this morning|)?"]),
    ("I am Tandem's demo assistant, a tiny model made for this demo.",
     ["(And who|Who|And what|What|So who|So what) are you( really| exactly|)?", "(What is|What's|Tell me|Please tell me|And what is) your name?",
      "Are you (a robot|human|a person|an AI|a machine|a language model|real|a large model|a chatbot|a human being|a program)?",
      "(Which|What|What kind of|What sort of) (model|assistant|program|AI|chatbot) are you?", "Do you have a name?",
      "(Please |Can you |Could you |)(introduce yourself|tell me about yourself|tell me who you are|say who you are|describe yourself).",
      "Who (made|built|trained|created) you?", "(Who|Whom|What) am I (talking|speaking|chatting) (to|with)?", "How (large|big|small) are you?"]),
    ("I can do small sums, remember what you tell me, repeat and reverse lists, and explain Tandem.",
     ["(What|What things|What else) can you do( for me| here|)?", "(How can you|How could you|Can you|Could you|Please|Will you) help me?",
      "What are (your skills|you good at|you able to do|you made for|your abilities)?",
      "What (can|may|should|could) I (ask|ask you|do here|do with you|ask here)?", "(Help|Help me|Please help|I need help|I need some help)(!|.)",
      "(What|Which) (do you know|can you help me with|questions can you answer|tasks can you do)?",
      "(Please |Can you |)(tell me what you can do|list your skills|say what you can do|show me what you can do|list what you can do).",
      "How can you be (of help|useful)?"]),
    ("Okay!",
     ["(Ok|Okay|Good|Great|Nice|Very good|I see|All right|Cool|Perfect|Well done|Right|Correct|Wonderful|Excellent|Fine|Interesting|"
      "Yes|Good job|That is right|That is correct|That is good|I understand|Very nice|Super)(!|.|, very good.|, I see.| then.|, nice.|, good.|)"]),
]

# Further wordings, for training alone, of topics with few.
_PRACTICE = {
    "I am Tandem's demo assistant, a tiny model made for this demo.":
        ["How (tall|large|big|small|old|clever|powerful) (is this model|is this assistant|is your model|is your network)?",
         "(Who|What) (made|built|trained|created|programmed) (this model|this assistant|the assistant|you then)?",
         "(Who|What) is (this|there|speaking|talking|this assistant|this model)?", "And (who|what) are you( then| anyway|)?",
         "How many parameters do you have?", "Where do you come from?", "By whom were you (made|built|trained)?"],
    "I can do small sums, remember what you tell me, repeat and reverse lists, and explain Tandem.":
        ["How can (you|this demo|this assistant) be (of help|helpful|useful|of use)( to me| here)?", "(What|Which) (skills|abilities|talents) do you have?",
         "(How|In what way|With what) (can|could) (you|this assistant) help( me| us| people|)( today| now|)?",
         "What (is this assistant|are you) (useful|good) for?", "What else (can you do|do you know|are you able to do)?",
         "I (do not know|don't know) what (to ask|to do|I can ask|you can do).", "What are my options?"],
}

SORRY = "Sorry, that is beyond a tiny demo model."

_OUTSIDE = [
    "Write a poem about {}.", "Write a story about a {}.", "Tell me a joke.", "Tell me a joke about a {}.", "Sing a song.",
    "What is the capital of {C}?", "Who was the first person on the moon?", "What is the weather like?", "What time is it?",
    "What day is it today?", "Translate {} into French.", "How do you say {} in German?", "What is the meaning of life?",
    "Who wrote {C}?", "How far is it to {C}?", "Write a program that prints {}.", "Write some code.", "How do I cook {}?",
    "Why is the sky blue?", "How old is the universe?", "Draw a {}.", "Show me a picture of a {}.", "Summarise this text.",
    "Who won the match yesterday?", "What is a {}?", "Give me a recipe.", "Play some music.", "What should I wear today?",
    "Book a flight to {C}.", "How do I get to {C}?", "Who is the president?", "Explain how a {} works.", "Write an email to {C}.",
    "Should I buy a {}?", "Do you like {}?", "How many {} are there in the world?", "Spell the word {}.", "What rhymes with {}?",
    "What is the square root of {n}?", "What is {N} plus {N}?", "What is {N} + {N}?", "What is {N} times {N}?", "What is {N} - {N}?",
    "Divide {n} by {n}.", "What is {n} / {n}?", "Is {n} a prime number?", "Tell me the news.", "Predict the future.",
    "Sort these words: {}, {}, {}.", "What is the opposite of {}?", "Can you drive a car?", "Let us talk about {}.",
    "Give me advice about a {}.", "Who invented the {}?", "Where can I buy a {}?", "What is the price of a {}?",
]


def _plain(text: str) -> str:
    """What is left of a wording when case and punctuation do not count."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _rank(text: str) -> bytes:
    """A fixed pseudo-random rank of a plain wording."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _by_split(topics):
    """{split: [(answer, wordings)]}: of each topic's wordings a seventh, at least two, is held out."""
    out = {TRAIN: [], HELDOUT: []}
    for answer, patterns in topics:
        wordings: dict[str, list[str]] = {}
        for text in (text for pattern in patterns for text in _expand(pattern)):
            wordings.setdefault(_plain(text), []).append(text)
        ranked = sorted(wordings, key=_rank)
        held = max(2, len(ranked) // 7)
        out[HELDOUT].append((answer, [text for key in ranked[:held] for text in wordings[key]]))
        out[TRAIN].append((answer, [text for key in ranked[held:] for text in wordings[key]]))
    return out


_TANDEM = _by_split(TANDEM)
_SMALLTALK = _by_split(SMALLTALK)
_HELD_PLAIN = {_plain(q) for topics in (_TANDEM, _SMALLTALK) for _, questions in topics[HELDOUT] for q in questions}
for _answer, _questions in _SMALLTALK[TRAIN]:
    _more = (text for pattern in _PRACTICE.get(_answer, ()) for text in _expand(pattern))
    _questions += [text for text in _more if _plain(text) not in _HELD_PLAIN]
_OUTSIDE_SPLIT = {
    split: [t for t in _OUTSIDE if split_of(t, 6) == split] for split in (TRAIN, HELDOUT)
}


def _lower_first(text: str) -> str:
    return text if text[:2].isupper() or text.startswith(("I ", "Tandem", "KV")) else text[0].lower() + text[1:]


def _dress(rng: random.Random, question: str) -> str:
    """The same question as people type it: a greeting in front, no question mark, lower case."""
    roll = rng.random()
    if roll < 0.5:
        return question
    if roll < 0.6:
        return question.rstrip("?.!")
    if roll < 0.7:
        return _lower_first(question)
    if roll < 0.75:
        return question.lower()
    lead = rng.choice(["Hi! ", "Hello! ", "Ok. ", "Quick question: ", "Another question: ", "One more thing. ", "My question: ",
                       "And now: ", "Next question. ", "So, ", "Hey, ", "Now, ", "Well, ", "And "])
    return lead + (_lower_first(question) if lead.endswith((", ", ": ", "And ")) else question)


_DROPPABLE = {"the", "a", "an", "do", "does", "is", "are", "i", "me", "of", "to", "in", "can", "you", "please"}


def _garble(rng: random.Random, text: str) -> str:
    """Carelessly typed text (training only): small words lost, letters lost, doubled or swapped."""
    words = text.split()
    if rng.random() < 0.5:
        words = [w for w in words if w.lower() not in _DROPPABLE or rng.random() < 0.5] or words
    else:
        at = rng.randrange(len(words))
        word = words[at]
        if len(word) > 4:
            i = rng.randrange(1, len(word) - 2)
            words[at] = word[:i] + rng.choice((word[i + 1] + word[i], word[i] * 2, "")) + word[i + 1 + rng.randint(0, 1):]
    return " ".join(words)


def _ask(rng: random.Random, split: str, topics) -> tuple[str, str]:
    answer, questions = rng.choice(topics[split])
    question = rng.choice(questions)
    if split == TRAIN and rng.random() < 0.15:
        garbled = _garble(rng, question)
        if _plain(garbled) not in _HELD_PLAIN:
            question = garbled
    return question, answer


def tandem_turn(rng: random.Random, split: str) -> tuple[str, str]:
    """A question about Tandem and its answer."""
    question, answer = _ask(rng, split, _TANDEM)
    dressed = _dress(rng, question)
    return (question if split == TRAIN and _plain(dressed) in _HELD_PLAIN else dressed), answer


def smalltalk_turn(rng: random.Random, split: str) -> tuple[str, str]:
    """A greeting or the like and the answer to it."""
    return _ask(rng, split, _SMALLTALK)


def outside_turn(rng: random.Random, split: str, word, capital) -> tuple[str, str]:
    """Something the model cannot do; `word` and `capital` make random fillers."""
    text = rng.choice(_OUTSIDE_SPLIT[split])
    while "{" in text:
        text = text.replace("{}", word(), 1).replace("{C}", capital(), 1)
        text = text.replace("{n}", str(rng.randint(2, 999)), 1).replace("{N}", str(rng.randint(1000, 99999)), 1)
    return text, SORRY
