//! Questions that look like a client's.

/// A question as a person might ask it. It must not be the same one every time: its answer could be learnt by
/// heart.
pub(super) fn question_of(seed: u64) -> String {
    let pick = |list: &'static str, shift: u32| {
        let list: Vec<&str> = list.split(", ").collect();
        // The multiplier spreads seeds that are alike in the low bits.
        let mixed = (seed.rotate_left(shift)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        list[mixed as usize % list.len()]
    };
    let (adjective, noun) = (pick(ADJECTIVES, 0), pick(NOUNS, 13));
    let (action, place) = (pick(ACTIONS, 29), pick(PLACES, 47));
    match seed % 5 {
        0 => format!("Write a short story about a {adjective} {noun} that {action} {place}."),
        1 => format!("Why would a {adjective} {noun} {place} be afraid? Answer in two sentences."),
        2 => format!("A {noun} {action} {place}. What happens next, and why is it {adjective}?"),
        3 => {
            format!("Describe the {noun} {place} in one paragraph. It is {adjective} and {action}.")
        }
        _ => format!(
            "Give me a title and a summary for a film in which a {adjective} {noun} {action} {place}."
        ),
    }
}

/// Returns true if a text is one of [`question_of`]'s.
pub fn is_question(text: &str) -> bool {
    let has = |list: &str| list.split(", ").any(|word| text.contains(word));
    let begins = [
        "Write a short story about a ",
        "Why would a ",
        "A ",
        "Describe the ",
        "Give me a title and a summary for a film in which a ",
    ];
    begins.iter().any(|begin| text.starts_with(begin)) && has(NOUNS) && has(PLACES)
}

/// Words with commas between them.
const ADJECTIVES: &str = "quiet, rusty, enormous, clever, lonely, golden, nervous, ancient, cheerful, invisible, \
    stubborn, sleepy, broken, curious, elegant, dusty";

const NOUNS: &str = "lighthouse, robot, baker, tortoise, violin, astronaut, umbrella, librarian, volcano, \
    postman, dragon, clock, gardener, submarine, fox, painter";

const ACTIONS: &str = "gets lost, learns to sing, finds a letter, builds a bridge, misses the train, wins a prize, \
    keeps a secret, tells a lie, repairs a radio, meets a stranger, forgets its name, counts the \
    stars";

const PLACES: &str = "under the sea, in the old town, behind the mountains, at the railway station, on a small \
    island, in winter, near the border, at the end of summer, in a crowded market, on the moon, \
    before breakfast, during a thunderstorm";
