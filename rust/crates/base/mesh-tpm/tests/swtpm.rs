//! Quotes of a TPM in software, and everything that is wrong with others.

use mesh_proto::TpmQuote;
use mesh_testkit::Swtpm;
use mesh_tpm::{Algorithm, PCRS, QuoteError, Quoter, verify};

const REQUEST: [u8; 32] = [7; 32];

#[test]
fn a_quote_holds_for_its_request_and_its_values_and_the_key_is_that_of_the_tpm() {
    let test = "a_quote_holds_for_its_request_and_its_values_and_the_key_is_that_of_the_tpm";
    let (Some(tpm), Some(other)) = (Swtpm::start(test), Swtpm::start(test)) else {
        return;
    };
    let quoter = Quoter::open(&tpm.socket()).unwrap();
    let quote = quoter.quote(&REQUEST).unwrap();
    let first = verify(&quote, &REQUEST).unwrap();
    assert_eq!(first.algorithm, Algorithm::EcdsaP256);
    assert!(first.key.starts_with("000b") && first.key.len() == 68);
    assert_eq!(first.manufacturer, "IBM");
    let indices: Vec<u8> = first.pcrs.iter().map(|(index, _)| *index).collect();
    assert_eq!(indices, PCRS);
    assert!(quoter.description().contains(&first.key));
    drop(quoter);

    tpm.extend(4, [9; 32]);
    let again = Quoter::open(&tpm.socket()).unwrap();
    let quote = again.quote(&REQUEST).unwrap();
    let second = verify(&quote, &REQUEST).unwrap();
    assert_eq!(second.key, first.key, "derived from the seed again");
    let changed: Vec<u8> = (first.pcrs.iter().zip(&second.pcrs))
        .filter(|(before, after)| before != after)
        .map(|(before, _)| before.0)
        .collect();
    assert_eq!(changed, [4]);

    let stranger = Quoter::open(&other.socket()).unwrap();
    let stranger = stranger.quote(&REQUEST).unwrap();
    assert_ne!(verify(&stranger, &REQUEST).unwrap().key, first.key);
    assert_eq!(verify(&quote, &[8; 32]), Err(QuoteError::Request));
    // Another key's statement, and old values.
    let foreign = TpmQuote {
        public: stranger.public.clone(),
        ..quote.clone()
    };
    assert_eq!(verify(&foreign, &REQUEST), Err(QuoteError::Signature));
    let mut old = quote;
    old.pcrs[4].value = vec![0; 32];
    assert_eq!(verify(&old, &REQUEST), Err(QuoteError::Values));
}

#[test]
fn a_key_that_was_lost_is_loaded_again() {
    let Some(mut tpm) = Swtpm::start("a_key_that_was_lost_is_loaded_again") else {
        return;
    };
    let quoter = Quoter::open(&tpm.socket()).unwrap();
    let name = quoter.description();
    tpm.restart();
    let quote = quoter.quote(&REQUEST).unwrap();
    assert!(name.contains(&verify(&quote, &REQUEST).unwrap().key));
    drop(tpm);
    let error = quoter.quote(&REQUEST).unwrap_err().to_string();
    assert!(error.contains("cannot open the TPM at"), "{error}");
}
